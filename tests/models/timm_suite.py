"""timm's own model tests on our models: `python tests/models/timm_suite.py [pytest's arguments]`.

They are taken from the source distribution of the timm that is installed (cached under .cache/, nothing of them is
kept here) and changed as a port to timm would change them: our names join the models whose output is no map, our
module those with `forward_intermediates`. Beyond that, its test of a pyramid of at least three features, meant for
convolutional networks, runs on ours as well. What downloads weights is left out, as in timm's own CI, and so is what
names models of timm's.

Variants that differ in depth, width and heads alone run the same code: of these, the smallest goes through all tests
and the others through those of their configuration and a forward pass. With --every all go through all.
"""

import os
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

import timm

ROOT = Path(__file__).resolve().parents[2]
RELEASE = f'timm-{version("timm")}'
CACHE = ROOT / '.cache' / RELEASE
MARKERS = ('base', 'forward', 'backward', 'cfg', 'cfg_nonstd', 'torchscript', 'features', 'fxforward', 'fxbackward')
FOR_ALL = ('test_model_forward', 'test_model_default_cfgs', 'test_model_default_cfgs_non_std')
# timm's CI leaves this one out, slow as it is: it prunes a model to each of its features. With --every it runs for all
SLOW = 'test_prune_intermediate_layers_contract'
SLOW_FOR = ('t2t_vit_4_16', 't2t_vit_dense')
EDITS = {  # a line of timm's file -> the line of the port
    'NON_STD_FILTERS = [\n': "NON_STD_FILTERS = [\n    't2t_vit*', 'vit_s_16*',\n",
    'FEAT_INTER_FILTERS = [\n': "FEAT_INTER_FILTERS = [\n    't2t_vit',\n",
}
NEWER = {  # older releases name models there, none of ours
    'EXCLUDE_FEAT_FILTERS = NON_STD_FILTERS[:]\n': 'EXCLUDE_FEAT_FILTERS = []\n'
}


def published_tests():
    """Return timm's tests/test_models.py as released, downloaded once.

    Raises:
        RuntimeError: if PyPI has it not, or cannot be reached.
    """
    path = CACHE / 'released.py'
    if path.exists():
        return path.read_text()
    CACHE.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        [
            sys.executable,
            '-m',
            'pip',
            'download',
            '--no-deps',
            '--no-binary',
            'timm',
            RELEASE.replace('-', '=='),
            '--dest',
            CACHE,
            '--quiet',
            '--disable-pip-version-check',
        ],
        capture_output=True,
        text=True,
    )
    archive = CACHE / f'{RELEASE}.tar.gz'
    if not archive.exists():
        raise RuntimeError(f'the source distribution of {RELEASE} cannot be had: {done.stderr.strip()[-200:]}')
    with tarfile.open(archive) as file:
        path.write_bytes(file.extractfile(f'{RELEASE}/tests/test_models.py').read())
    archive.unlink()
    return path.read_text()


def ported_tests():
    """Write the file to run: the released one with the edits of a port."""
    text = published_tests()
    for line, edited in {**EDITS, **NEWER}.items():
        if text.count(line) not in ((0, 1) if line in NEWER else (1,)):
            raise RuntimeError(f'expected one line {line!r} in the tests of {RELEASE}, found {text.count(line)}')
        text = text.replace(line, edited)
    path = CACHE / 'test_models.py'
    path.write_text(text)
    return path


def ours(name):
    import t2t_vit

    return name.split('.')[0] in t2t_vit.VARIANTS


def smallest():
    """Return the smallest variant of each structure."""
    from t2t_vit import VARIANTS

    by_size = sorted(
        VARIANTS,
        key=lambda name: (
            VARIANTS[name].embed_dim ** 2 * sum(depth if isinstance(depth := VARIANTS[name].depth, tuple) else (depth,))
        ),
    )
    first = {}
    for name in by_size:
        variant = VARIANTS[name]
        first.setdefault((variant.token_layer, variant.block, variant.splits), name)
    return set(first.values())


def pytest_addoption(parser):
    parser.addoption('--every', action='store_true', help='all tests for all models')


def pytest_configure(config):
    """Let timm list only our models, in every worker."""
    for marker in MARKERS:
        config.addinivalue_line('markers', marker)
    for function in ('list_models', 'list_pretrained'):
        listed = getattr(timm, function)
        setattr(timm, function, lambda *args, listed=listed, **kwargs: list(filter(ours, listed(*args, **kwargs))))


def pytest_collection_modifyitems(config, items):
    """Skip tests of timm's own models, and tests that variants of a structure repeat."""
    chosen = smallest()

    def wanted(item):
        name = str(item.callspec.params.get('model_name')) if hasattr(item, 'callspec') else ''
        if not ours(name) or config.option.every:
            return ours(name)
        if item.originalname == SLOW:
            return name in SLOW_FOR
        return name in chosen or item.originalname in FOR_ALL

    config.hook.pytest_deselected(items=[item for item in items if not wanted(item)])
    items[:] = filter(wanted, items)


def run(*args):
    """Run the suite; return the `testsuite` of its JUnit report, and pytest's output."""
    report = CACHE / 'report.xml'
    report.unlink(missing_ok=True)
    done = subprocess.run(
        [
            sys.executable,
            '-m',
            'pytest',
            ported_tests(),
            '-c',
            os.devnull,
            '--rootdir',
            CACHE,
            '-p',
            'timm_suite',
            '-p',
            'no:cacheprovider',
            '-n',
            '1',
            '-q',
            '--no-header',
            '-rs',
            '--junitxml',
            report,
            *args,
        ],
        env={
            **os.environ,
            'GITHUB_ACTIONS': '1',
            'OMP_NUM_THREADS': '1',
            'PYTHONPATH': os.pathsep.join(str(path) for path in (ROOT / 'tests' / 'models', ROOT / 'src')),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if not report.exists():
        raise RuntimeError(f'the tests did not run:\n{done.stdout[-3000:]}')
    return ElementTree.parse(report).getroot().find('testsuite'), done.stdout


if __name__ == '__main__':
    suite, output = run(*sys.argv[1:])
    print(output)
    sys.exit(int(suite.get('failures')) + int(suite.get('errors')) > 0)
