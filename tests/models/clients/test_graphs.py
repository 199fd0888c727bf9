"""Clients that turn a model into a graph or transform it: FX, TorchScript, ONNX, compile, torch.func, FLOPs."""

import io
import warnings

import client_models as cm
import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch.func import functional_call, grad, jacrev, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


@torch.no_grad()
def test_symbolic_trace_without_leaves(name, agree):
    graph = torch.fx.symbolic_trace(cm.build(name))
    for batch in (2, 3):
        agree(graph(cm.images(batch)), cm.plain(name)(cm.images(batch)))


def test_symbolic_trace_trains(name, agree):
    graph = torch.fx.symbolic_trace(cm.build(name))
    agree(cm.gradients(graph, cm.images()), cm.gradients(cm.plain(name), cm.images()))


# TorchScript is deprecated and says so; tracing mentions every size that becomes a constant
@pytest.mark.filterwarnings('ignore::DeprecationWarning', 'ignore::FutureWarning')
@pytest.mark.parametrize('scriptable', [False, True])
def test_script(name, scriptable, agree):
    """With and without timm's `scriptable=True`, which its own scripts pass."""
    script = torch.jit.script(cm.build(name, scriptable=scriptable))
    reference = cm.plain(name)
    for batch in (2, 3):  # the second run is the optimised one
        agree(script(cm.images(batch)).detach(), reference(cm.images(batch)).detach())
    agree(cm.gradients(script, cm.images()), cm.gradients(reference, cm.images()))


@pytest.mark.filterwarnings('ignore::DeprecationWarning', 'ignore::FutureWarning')
@torch.no_grad()
def test_script_saved_and_loaded(name, agree):
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(cm.build(name)), buffer)
    buffer.seek(0)
    agree(torch.jit.load(buffer)(cm.images()), cm.plain(name)(cm.images()))


@pytest.mark.filterwarnings('ignore::DeprecationWarning', 'ignore::FutureWarning')
@pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning')
@pytest.mark.parametrize('enabled', [False, True])
def test_trace(name, enabled, agree):
    with torch.set_grad_enabled(enabled):
        graph = torch.jit.trace(cm.build(name), cm.images(), check_trace=True)
        for batch in (2, 3):
            agree(graph(cm.images(batch)).detach(), cm.plain(name)(cm.images(batch)).detach())
    if enabled:
        agree(cm.gradients(graph, cm.images()), cm.gradients(cm.plain(name), cm.images()))


@pytest.mark.filterwarnings('ignore::DeprecationWarning', 'ignore::FutureWarning', 'ignore::UserWarning')
@pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning')
@torch.no_grad()
def test_legacy_onnx_exporter_with_any_batch(name, agree):
    runtime = pytest.importorskip('onnxruntime')
    file = io.BytesIO()
    torch.onnx.export(
        cm.build(name),
        (cm.images(),),
        file,
        dynamo=False,
        input_names=['images'],
        output_names=['logits'],
        dynamic_axes={'images': {0: 'batch'}, 'logits': {0: 'batch'}},
        opset_version=17,
    )
    session = runtime.InferenceSession(file.getvalue(), providers=['CPUExecutionProvider'])
    for batch in (1, 2, 5):
        (logits,) = session.run(None, {'images': cm.images(batch).numpy()})
        agree(torch.from_numpy(logits), cm.plain(name)(cm.images(batch)))


@torch.no_grad()
def test_torch_export_with_any_batch(name, agree):
    program = torch.export.export(cm.build(name), (cm.images(),), dynamic_shapes=({0: torch.export.Dim('batch')},))
    assert 'channels_last' not in program.graph_module.code  # ExecuTorch's XNNPACK fails on such kernels
    assert 'im2col' not in program.graph_module.code  # the fast form
    for batch in (1, 2, 5):
        agree(program.module()(cm.images(batch)), cm.plain(name)(cm.images(batch)))


@pytest.mark.parametrize('name', [cm.VIT, 't2t_vit_7'])  # a quarter of a minute each
def test_compile_with_a_second_image_size_and_gradients(name, agree):
    kwargs = dict(depth=1, dynamic_img_size=True)
    torch.compiler.reset()
    model, reference = cm.build(name, **kwargs), cm.plain(name, **kwargs)
    compiled = torch.compile(model, backend='aot_eager')
    for size in (64, 96):
        x = cm.images(size=size)
        agree(compiled(x).detach(), reference(x).detach())
        found = {key.removeprefix('_orig_mod.'): g for key, g in cm.gradients(compiled, x).items()}
        agree(found, cm.gradients(reference, x))


def test_compiled_layers_save_no_permuted_view():
    """Inductor cannot lower one with symbolic sizes (docs/clients.md); running its compiler takes minutes."""
    saved = []

    def record(graph, inputs):
        (output,) = (node for node in graph.graph.nodes if node.op == 'output')
        saved.extend(node.target for node in output.args[0] if isinstance(node, torch.fx.Node))
        return make_boxed_func(graph.forward)

    torch.compiler.reset()
    model = cm.build('t2t_vit_7', depth=1, splits=((7, 4, 2), (3, 2, 1)), token_dim=8, embed_dim=16, num_heads=1)
    x = cm.images()
    for side in (2, 3):
        torch._dynamo.mark_dynamic(x, side)
    torch.compile(model.tokens_to_token, backend=aot_autograd(fw_compiler=record))(x)
    assert torch.ops.aten.convolution.default in saved and torch.ops.aten.permute.default not in saved


def test_functional_call_and_grad(name, agree):
    model, reference, x = cm.build(name), cm.plain(name), cm.images()
    weights = {key: p.detach() for key, p in reference.named_parameters()}

    def run(weights):
        return cm.loss(functional_call(model, weights, (x,)))

    found = grad(run)(weights)
    agree(found, cm.gradients(reference, x))


NO_RULE = pytest.mark.filterwarnings('ignore:There is a performance drop:UserWarning')  # attention, on a CPU


@NO_RULE
def test_vmap_over_samples_and_models(name, agree):
    model, reference, x = cm.build(name), cm.plain(name), cm.images(3)
    weights = {key: p.detach() for key, p in model.named_parameters()}
    with torch.no_grad():
        agree(vmap(lambda image: model(image[None])[0])(x), reference(x))
    per_sample = vmap(grad(lambda w, image: cm.loss(functional_call(model, w, (image[None],)))), (None, 0))(weights, x)
    for i in range(3):
        agree({key: g[i] for key, g in per_sample.items()}, cm.gradients(reference, x[i : i + 1]))


@NO_RULE
def test_jacobian(name, agree):
    model, reference, x = cm.build(name), cm.plain(name), cm.images(1, 64)
    found = jacrev(lambda image: model(image)[0, :2])(x)
    expected = torch.autograd.functional.jacobian(lambda image: reference(image)[0, :2], x)
    agree(found, expected)


def penalty(model, x):
    """Return the gradients of a penalty on the gradient of the loss."""
    with sdpa_kernel(SDPBackend.MATH):
        first = torch.autograd.grad(cm.loss(model(x)), list(model.parameters()), create_graph=True)
        sum(gradient.square().sum() for gradient in first).backward()
    return {key: p.grad for key, p in model.named_parameters() if p.grad is not None}


def test_second_derivatives(name, agree):
    agree(penalty(cm.build(name), cm.images()), penalty(cm.plain(name), cm.images()))


@pytest.mark.filterwarnings('ignore:`torch.jit.script` is deprecated:FutureWarning')  # by torch, for itself
def test_forward_mode(name, agree):
    x, tangent = cm.images(), cm.images().flip(0)
    with sdpa_kernel(SDPBackend.MATH):
        found, expected = (jvp(model, (x,), (tangent,))[1] for model in (cm.build(name), cm.plain(name)))
    agree(found, expected)


def test_flop_counter(name):
    """torch's counter sees the matmuls of either form; the fast one has no more of them."""
    counts = []
    for model in (cm.build(name), cm.plain(name)):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(cm.images())
        counts.append(counter.get_total_flops())
    found, expected = counts
    assert 0.8 * expected < found <= 1.01 * expected


def test_fvcore_flop_counter(name):
    fvcore = pytest.importorskip('fvcore.nn')
    counts = []
    for model in (cm.build(name), cm.plain(name)):
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            counter = fvcore.FlopCountAnalysis(model, cm.images()).unsupported_ops_warnings(False)
            counts.append(counter.total())
            weighted = {key for key, part in model.named_modules() if any(True for _ in part.parameters())}
            assert not counter.uncalled_modules() & weighted
    found, expected = counts
    assert 0.8 * expected < found <= 1.01 * expected
