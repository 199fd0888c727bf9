"""timm's model tests pass on our models, see timm_suite; `make test-timm` runs all tests on all models."""

import os

import pytest
from timm_suite import published_tests, run, smallest

from t2t_vit.models.variants import VARIANTS, pretrained_cfgs


@pytest.mark.timeout(1800)
def test_timm_test_suite_passes():
    try:
        published_tests()
    except RuntimeError as error:
        if os.environ.get('CI'):
            raise
        pytest.skip(str(error))
    suite, output = run()
    count = {kind: int(suite.get(kind)) for kind in ('tests', 'failures', 'errors', 'skipped')}
    assert count['failures'] == count['errors'] == 0, output
    chosen, cfgs = len(smallest()), len(pretrained_cfgs())
    # six tests of each structure, a forward pass of other variants, one test of each configuration; one is skipped
    assert count['tests'] - count['skipped'] >= 6 * chosen + (len(VARIANTS) - chosen) + cfgs - 1
