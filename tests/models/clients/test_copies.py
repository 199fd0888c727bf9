"""Clients that copy a model: pickle, deepcopy, whole-module files, other processes."""

import copy
import io
import pickle

import client_models as cm
import pytest
import torch


def save_whole(model):
    """Through torch.save of the whole module, which needs `weights_only=False`."""
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {'pickle': lambda model: pickle.loads(pickle.dumps(model)), 'deepcopy': copy.deepcopy, 'file': save_whole}


@pytest.mark.parametrize('kind', COPIES)
def test_copies(name, kind, agree):
    original, x = cm.build(name), cm.images()
    clone, reference = COPIES[kind](original), cm.plain(name)
    agree(clone(x).detach(), original(x).detach(), 0)  # the fast form still
    agree(cm.gradients(clone, x), cm.gradients(reference, x))
    with torch.no_grad():
        for parameter in original.parameters():
            parameter.zero_()
    agree(clone(x).detach(), reference(x).detach())  # shares nothing with the original


@pytest.mark.parametrize('kind', COPIES)
def test_copies_of_a_hooked_model(name, kind, agree):
    """A copy of a model whose layers fell back to their plain form works, and so does the original afterwards."""
    original, x = cm.build(name), cm.images()
    handle = original.blocks[-1].norm1.register_forward_hook(print_nothing)
    clone = COPIES[kind](original)
    agree(clone(x).detach(), cm.plain(name)(x).detach())
    handle.remove()
    agree(original(x).detach(), cm.plain(name)(x).detach())


def print_nothing(module, args, output):
    """Do nothing; a function of this module, so that it can be pickled."""


def run(model, x, queue):
    """Send the logits back from another process."""
    torch.set_num_threads(1)
    with torch.no_grad():
        queue.put(model(x).numpy())


def test_spawned_process(agree):
    context = torch.multiprocessing.get_context('spawn')
    queue = context.Queue()
    process = context.Process(target=run, args=(cm.build('t2t_vit_7'), cm.images(), queue))
    process.start()
    found = torch.from_numpy(queue.get(timeout=120))
    process.join()
    assert process.exitcode == 0
    agree(found, cm.plain('t2t_vit_7')(cm.images()).detach())
