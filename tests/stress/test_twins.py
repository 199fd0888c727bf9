"""Check that images and weights give the same answer in every encoding, with inputs that hypothesis finds."""

import random

import numpy as np
import pytest
import torch
from fuzz_damage import mangle
from fuzz_twins import INVERSE, LAYOUTS, MODES, digest, encode_image, encode_weights
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from test_checkpoints import tiny

from t2t_vit.data.decode import decode_image
from t2t_vit.models.checkpoints import load_weights
from t2t_vit.models.safe_load import CheckpointError

ENCODINGS = [(mode, format) for mode, formats in MODES.items() for format in formats]
PIXELS = arrays(np.uint8, st.tuples(st.integers(2, 24), st.integers(2, 24), st.just(4)))


@pytest.mark.parametrize('mode, format', ENCODINGS)
@settings(max_examples=12, deadline=None)
@given(pixels=PIXELS, orientation=st.sampled_from([*INVERSE]), trailing=st.binary(max_size=20))
def test_images_decode_alike_in_every_encoding(mode, format, pixels, orientation, trailing):
    content, shown = encode_image(pixels, mode, format, orientation)
    assert np.array_equal(np.asarray(decode_image(content)), shown)
    if format in ('png', 'gif', 'bmp', 'ppm'):  # readers ignore what follows the image
        assert np.array_equal(np.asarray(decode_image(content + trailing)), shown)


torch.manual_seed(0)
WEIGHTS = {key: value.clone() for key, value in tiny().state_dict().items()}


@pytest.mark.parametrize('old', [False, True])
@pytest.mark.parametrize('layout', LAYOUTS)
def test_weights_load_alike_in_every_layout(layout, old, tmp_path):
    file = tmp_path / 'model.pth'
    file.write_bytes(encode_weights(WEIGHTS, layout, random.Random(0), old))
    model = tiny()
    load_weights(model, file)
    assert digest(model.state_dict()) == digest(WEIGHTS)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_damaged_archive_loads_unchanged_or_is_refused(seed, tmp_path_factory):
    rng = random.Random(seed)
    content, _ = mangle(rng, encode_weights(WEIGHTS, 'plain', rng))
    file = tmp_path_factory.mktemp('damaged') / 'model.pth'
    file.write_bytes(content)
    model = tiny()
    try:
        load_weights(model, file)
    except (CheckpointError, ValueError):
        return
    assert digest(model.state_dict()) == digest(WEIGHTS)
