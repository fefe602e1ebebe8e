"""Common tools handle our ViT as they handle timm's: export, tracing, PEFT, profilers, ONNX."""

import copy
import io
import pickle

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay
from torch.utils.checkpoint import checkpoint_sequential
from torchvision.models.feature_extraction import create_feature_extractor

from model import VisionTransformer, ViTConfig

SIZE = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 4}
SIZE = {**SIZE, "num_classes": 6}
ARCHITECTURES = {
    "class token": {},
    "mean pooling, any image size": {
        "global_pool": "avg", "class_token": False, "init_values": 0.1, "dynamic_img_size": True,
    },
    "no position for the class token": {"no_embed_class": True, "qkv_bias": False},
}  # fmt: skip
IMAGES = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=ARCHITECTURES)
def options(request):
    return {**SIZE, **ARCHITECTURES[request.param]}


@pytest.fixture
def model(options):
    return random_model(options)


def random_model(options):
    """A model in eval mode in which no parameter has a special value such as 0."""
    torch.manual_seed(0)
    model = VisionTransformer(ViTConfig(**options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def timm_model(options, state):
    model = timm.models.VisionTransformer(**options).eval()
    model.load_state_dict(state)
    return model


def assert_same_logits(tool, model, images=IMAGES):
    """Also for a batch of another size than the tool may have seen."""
    with torch.no_grad():
        for batch in (images, images[:2]):
            torch.testing.assert_close(tool(batch), model(batch), atol=1e-5, rtol=1e-5)


# Python and torch


def test_deepcopy_and_pickle_keep_the_logits(model):
    assert_same_logits(copy.deepcopy(model), model)
    assert_same_logits(pickle.loads(pickle.dumps(model)), model)


def test_compile_finds_no_graph_break(model):
    check_compiled(model, bf16=False)


def test_compile_finds_no_graph_break_in_bf16():
    check_compiled(random_model(SIZE), bf16=True)


def check_compiled(model, bf16):
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        logits, expected = compiled(IMAGES), model(IMAGES)
    torch.testing.assert_close(logits, expected)
    logits.float().square().sum().backward()
    compiled_gradient = model.pos_embed.grad.clone()
    model.zero_grad()
    expected.float().square().sum().backward()
    torch.testing.assert_close(compiled_gradient, model.pos_embed.grad)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
@pytest.mark.parametrize("tool", ["script", "trace"])
def test_torchscript_keeps_the_logits(model, tool):
    scripted = torch.jit.script(model) if tool == "script" else torch.jit.trace(model, IMAGES)
    file = io.BytesIO()
    torch.jit.save(scripted, file)
    file.seek(0)
    assert_same_logits(torch.jit.load(file), model)


def test_export_accepts_a_dynamic_batch(model):
    batch = torch.export.Dim("batch")
    program = torch.export.export(model, (IMAGES,), dynamic_shapes=({0: batch},))
    assert_same_logits(program.module(), model)


@pytest.mark.parametrize("training", [False, True])
def test_fx_traces_the_model(model, training):
    traced = torch.fx.symbolic_trace(model.train(training))
    assert_same_logits(traced, model)
    with pytest.raises(ValueError, match="expected images of shape"):
        traced(torch.randn(1, 1, 16, 16))


def test_fx_traces_other_image_sizes():
    model = random_model({**SIZE, "dynamic_img_size": True})
    traced = torch.fx.symbolic_trace(model)
    assert_same_logits(traced, model, torch.randn(3, 3, 24, 24))


def test_feature_extractor_returns_the_output_of_a_block(model):
    extractor = create_feature_extractor(model, {"blocks.1": "tokens", "head": "logits"})
    tokens = model.blocks[:2](model.embed(IMAGES))
    found = extractor(IMAGES)
    torch.testing.assert_close(found["tokens"], tokens)
    torch.testing.assert_close(found["logits"], model(IMAGES))


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_vmap_of_grad_gives_the_gradient_of_each_image(model):
    parameters = {name: value.detach() for name, value in model.named_parameters()}

    def loss(parameters, image):
        return torch.func.functional_call(model, parameters, (image[None],)).square().sum()

    per_image = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, IMAGES)
    model(IMAGES[3:4]).square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(per_image[name][3], parameter.grad, atol=1e-4, rtol=1e-4)


def test_activation_checkpointing_keeps_the_gradients(model):
    tokens = checkpoint_sequential(model.blocks, 3, model.embed(IMAGES), use_reentrant=False)
    model.forward_head(model.norm(tokens)).square().sum().backward()
    checkpointed = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    model(IMAGES).square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(checkpointed[name], parameter.grad)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_close_to_single_precision(model, dtype):
    expected = model(IMAGES)
    logits = model.to(dtype)(IMAGES.to(dtype))
    assert logits.dtype == dtype
    torch.testing.assert_close(logits.float(), expected, atol=0.05, rtol=0.05)


@pytest.mark.filterwarnings("ignore:.*deprecated")
def test_dynamic_quantization_is_close_to_single_precision(model):
    quantized = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear})
    assert not any(type(module) is torch.nn.Linear for module in quantized.modules())
    torch.testing.assert_close(quantized(IMAGES), model(IMAGES), atol=0.1, rtol=0.1)


def test_a_model_on_the_meta_device_takes_no_memory(options):
    with torch.device("meta"):
        model = VisionTransformer(ViTConfig(**options))
        assert model(torch.empty(2, 3, 16, 16)).shape == (2, 6)
    assert all(parameter.is_meta for parameter in model.parameters())


def test_hooks_on_attn_drop_see_the_weights_when_attention_is_not_fused(model):
    """How tools written for timm read attention weights."""
    block, seen = model.blocks[1], []
    block.attn.attn_drop.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    model(IMAGES)
    assert seen == []
    block.attn.fused_attn = False
    model(IMAGES)
    x = block.norm1(model.blocks[:1](model.embed(IMAGES)))
    torch.testing.assert_close(seen[0], block.attn(x, return_weights=True)[1])


# timm


def parameter_groups(model, **arguments):
    """timm's groups for layer-wise decay, with names in place of parameters."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = param_groups_layer_decay(model, **arguments)
    return [{**group, "params": [names[id(p)] for p in group["params"]]} for group in groups]


def test_layer_decay_groups_equal_those_of_timms_model(options, model):
    reference = timm_model(options, model.state_dict())
    groups, expected = (
        parameter_groups(m, layer_decay=0.7, no_weight_decay_list=m.no_weight_decay())
        for m in (model, reference)
    )
    assert groups == expected
    assert len({group["lr_scale"] for group in groups}) == 3 + 2  # blocks, embedding, head


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"indices": 2, "norm": True},
        {"indices": [0, -1], "output_fmt": "NLC"},
        {"indices": [1, 0], "stop_early": True, "intermediates_only": True},
        {"indices": [-2], "stop_early": True},
        {"indices": [1], "return_prefix_tokens": True, "norm": True},
    ],
    ids=str,
)
def test_forward_intermediates_equals_timm(options, model, arguments):
    reference = timm_model(options, model.state_dict())
    images = torch.randn(2, 3, 24, 24) if options.get("dynamic_img_size") else IMAGES
    found = model.forward_intermediates(images, **arguments)
    expected = reference.forward_intermediates(images, **arguments)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"indices": 4}, r"indices=\[-4, -3, -2, -1\] do not fit a model with 3 blocks"),
        ({"indices": [0, 3]}, r"indices=\[0, 3\] do not fit a model with 3 blocks"),
        ({"output_fmt": "NHWC"}, "output_fmt='NHWC' must be 'NCHW' or 'NLC'"),
    ],
)
def test_forward_intermediates_names_a_wrong_argument(arguments, message):
    with pytest.raises(ValueError, match=message):
        random_model(SIZE).forward_intermediates(IMAGES, **arguments)


# Optional packages


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
def test_fvcore_counts_the_linear_layers(options, model):
    fvcore = pytest.importorskip("fvcore.nn", reason="fvcore is not installed")
    count = fvcore.FlopCountAnalysis(model, IMAGES[:1]).unsupported_ops_warnings(False)
    count = count.uncalled_modules_warnings(False).by_operator()
    dim, patches, tokens = 32, 16, 16 + model.num_prefix_tokens
    assert count["conv"] == patches * (3 * 4 * 4) * dim
    assert count["linear"] == 3 * tokens * 12 * dim**2 + 6 * dim


def test_torchinfo_counts_the_parameters(model):
    torchinfo = pytest.importorskip("torchinfo", reason="torchinfo is not installed")
    summary = torchinfo.summary(model, input_data=IMAGES, verbose=0)
    assert summary.total_params == sum(p.numel() for p in model.parameters())
    assert summary.summary_list[0].output_size == [5, 6]


def test_peft_trains_only_its_own_parameters_and_merges(model):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    plain = copy.deepcopy(model)
    config = peft.LoraConfig(r=2, target_modules=["qkv", "attn.proj"], init_lora_weights=True)
    adapted = peft.get_peft_model(model, config)
    assert_same_logits(adapted, plain)
    adapted(IMAGES).square().mean().backward()
    torch.optim.SGD(adapted.parameters(), lr=0.1).step()
    trained = [name for name, p in adapted.named_parameters() if p.grad is not None]
    assert len(trained) == 3 * 2 * 2  # blocks x layers x (A, B)
    assert all("lora_" in name for name in trained)
    merged = copy.deepcopy(adapted).merge_and_unload()
    assert type(merged) is VisionTransformer
    assert_same_logits(merged, adapted)
    assert not torch.allclose(merged(IMAGES), plain(IMAGES), atol=1e-3)


@pytest.mark.parametrize("options", ["mean pooling, any image size"], indirect=True)
def test_onnx_accepts_a_dynamic_batch(model):
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    program = torch.onnx.export(
        model, (IMAGES,), dynamo=True, external_data=False, verbose=False,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
    )  # fmt: skip
    session = runtime.InferenceSession(program.model_proto.SerializeToString())
    name = session.get_inputs()[0].name
    assert_same_logits(lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0]), model)
