"""What a configuration can ask for besides sizes, and what else only shows in training mode.

Each entry is a mistake with a test, as in symptoms.py. The first test that is positive counts.
"""

import torch
from torch import Tensor

from lab.exercise.layouts import flat, slots
from lab.exercise.reference import named, reference_class
from lab.exercise.symptoms import Symptom
from lab.exercise.trials import BASE, TWO, Case, Evidence, Trial, close

# Five tokens and 24 channels: with so few tokens the output determines the attention weights.
_ATTENTION_DROPOUT = Case("attention dropout", BASE | {"img_size": 8, "attn_drop_rate": 0.5})
# More classes than features: the logits determine the features.
_HEAD_DROPOUT = Case("dropout before the head", BASE | {"drop_rate": 0.5, "num_classes": 48})
_LAYER_SCALE = Case("LayerScale", BASE | {"init_values": 0.1})
MEAN = Case("global_pool='avg'", BASE | {"global_pool": "avg"})
_ONE_BLOCK = Case("one block", BASE | {"depth": 1})
_NO_BIAS = Case("no bias of qkv", BASE | {"qkv_bias": False})
_NO_TOKEN = Case("no class token", BASE | {"global_pool": "avg", "class_token": False})


def _training(evidence: Evidence, case: Case) -> Trial:
    """A trial in training mode."""
    trial = Trial(evidence, case)
    if trial.module:
        trial.module.train()
    return trial


def _dropout_without_effect(evidence: Evidence, case: Case) -> bool:
    return close(_training(evidence, case).run(), evidence.trial(case).run())


def _has_dropout(evidence: Evidence) -> bool:
    return not close(_training(evidence, TWO).run(), evidence.trial(TWO).run())


def _drops_other_features(evidence: Evidence) -> bool:
    """Whether the head does not get the right features (B, D), each either zero or doubled."""
    reference, seen = evidence.reference(_HEAD_DROPOUT), []
    head = reference.head
    head.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    with torch.no_grad():
        reference(evidence.trial(_HEAD_DROPOUT).inputs)
        logits = _training(evidence, _HEAD_DROPOUT).run()
        features = torch.linalg.lstsq(head.weight, (logits - head.bias).mT).solution.mT
    dropped = features.abs() < 1e-6
    right = torch.where(dropped, features, 2 * seen[0])
    return bool(dropped.all()) or not close(features, right)


def _wrong_pair(evidence: Evidence) -> bool:
    out = evidence.trial(TWO).run(return_weights=True)
    return not isinstance(out, tuple) or len(out) != 2


def _output_changes(evidence: Evidence) -> bool:
    trial = evidence.trial(TWO)
    return not close(trial.run(return_weights=True)[0], trial.run())


def _wrong_weights(evidence: Evidence, case: Case, train: bool = False) -> bool:
    trial = _training(evidence, case) if train else evidence.trial(case)
    return not close(trial.run(return_weights=True)[1], _correct_weights(evidence, case))


def _correct_weights(evidence: Evidence, case: Case) -> Tensor:
    """The weights (B, h, N, N) of timm's module, without dropout."""
    reference, seen = evidence.reference(case), []
    reference.attn_drop.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    reference(evidence.trial(case).inputs)
    return seen[0]


def _acting_weights(evidence: Evidence) -> Tensor | None:
    """The weights (B, h, N, N) that the part applies in training mode; None if its output is no
    weighted sum of values.

    The output is compared with what timm's module returns if a single weight is one.
    """
    trial = _training(evidence, _ATTENTION_DROPOUT)
    reference = evidence.reference(_ATTENTION_DROPOUT)
    heads, tokens = trial.config.num_heads, trial.inputs.shape[1]
    single = torch.cat([torch.zeros(1, heads * tokens), torch.eye(heads * tokens)])
    with torch.no_grad():
        outputs = []
        for weights in single.reshape(-1, heads, 1, tokens):
            hook = reference.attn_drop.register_forward_hook(
                lambda module, args, out, weights=weights: weights.expand_as(out)
            )
            outputs.append(reference(trial.inputs)[:, 0])  # the same for every query
            hook.remove()
        nothing, *single_outputs = outputs
        basis = torch.stack(single_outputs, -1) - nothing[..., None]  # (B, D, h * N)
        wanted = (trial.run() - nothing[:, None]).mT  # (B, D, N)
        weights = torch.linalg.lstsq(basis, wanted).solution  # (B, h * N, N)
    if not close(basis @ weights, wanted):
        return None
    return weights.mT.unflatten(2, (heads, tokens)).transpose(1, 2)


def _drops_no_weights(evidence: Evidence) -> bool:
    return _acting_weights(evidence) is None


def _drops_scores(evidence: Evidence) -> bool:
    sums = _acting_weights(evidence).sum(-1)
    return close(sums, torch.ones_like(sums))


def _drops_wrongly(evidence: Evidence) -> bool:
    acting, right = _acting_weights(evidence), 2 * _correct_weights(evidence, _ATTENTION_DROPOUT)
    dropped = acting.abs() < 1e-6
    return bool(dropped.all()) or not close(acting, torch.where(dropped, acting, right))


def _num_parameters(evidence: Evidence, case: Case) -> int:
    return sum(slot.tensor.numel() for slot in evidence.trial(case).slots)


def _bias_of_qkv_remains(evidence: Evidence) -> bool:
    """Whether qkv_bias=False removes other parameters than the biases of queries, keys and values.

    nn.MultiheadAttention also loses the bias of its output, which is accepted.
    """
    removed = _num_parameters(evidence, TWO) - _num_parameters(evidence, _NO_BIAS)
    return removed not in (3 * BASE["embed_dim"], 4 * BASE["embed_dim"])


def _changed_images(evidence: Evidence) -> Tensor:
    """Which of 64 images (B,) a block changes in training mode with drop_path=0.9."""
    trial = Trial(evidence, Case("many images", batch=64))
    trial.module = evidence.build(trial.config, 0.9).train()
    with torch.no_grad():
        return (trial.run() - trial.inputs).flatten(1).abs().amax(1) > 0


def _disagrees(evidence: Evidence, case: Case) -> bool:
    """Whether the output is wrong. Raises Failure for an exception in the student's code."""
    if evidence.agrees(cases=(case,)):
        return False
    if error := evidence.outcome(case).error:
        raise evidence.submission.explain(error)
    return True


def _ignores_pre_logits(evidence: Evidence) -> bool:
    trial = evidence.trial(TWO)
    try:
        features = trial.module.forward_head(
            trial.module.forward_features(trial.inputs.clone()), pre_logits=True
        )
    except NotImplementedError:  # everything is written in forward
        return False
    except Exception as error:
        raise evidence.submission.explain(error) from error
    return features.shape != (len(trial.inputs), trial.config.embed_dim)


def _drop_path_rates(evidence: Evidence) -> list[float]:
    """The rates of three blocks, if they are the reference's."""
    config = evidence.submission.config(BASE | {"depth": 3, "drop_path_rate": 0.4})
    model = evidence.build(config)
    blocks = [m for m in model.modules() if isinstance(m, reference_class("Block"))]
    return [round(float(block.drop_path_rate), 6) for block in blocks]  # may be tensors


def _initial_deviations(evidence: Evidence) -> dict[str, float]:
    """The standard deviation of two parameters of a new model."""
    config = evidence.trial(TWO).config
    torch.default_generator.manual_seed(evidence.seed)
    model = evidence.build(config)
    values, layout = flat([slot.tensor for slot in slots(model)]), evidence.layout(TWO)
    return {name: float(values[layout[name]].std()) for name in ("pos_embed", "head.weight")}


OPTIONS: dict[str, tuple[Symptom, ...]] = {
    "Attention": named({
        "qkv_bias ignored": Symptom(
            "With config.qkv_bias=False the layer must have 3 * embed_dim parameters fewer than "
            "with True.",
            "nn.Linear has a bias unless it is given bias=False",
            _bias_of_qkv_remains,
            method="__init__",
        ),
        "weights not returned": Symptom(
            "With return_weights=True the result must be (output, weights).",
            "return_weights is accepted, but not used",
            _wrong_pair,
        ),
        "return_weights changes the output": Symptom(
            "With return_weights=True the output changes; it must not.",
            "The two cases are computed by different lines",
            _output_changes,
        ),
        "wrong weights returned": Symptom(
            "With return_weights=True the weights must be (B, h, N, N), after the softmax.",
            "The scores are returned, or the mean over the heads",
            lambda evidence: _wrong_weights(evidence, TWO),
        ),
        "no attention dropout": Symptom(
            "config.attn_drop_rate has no effect in training mode.",
            "The dropout is not created, not called, or not given training=self.training",
            lambda evidence: _dropout_without_effect(evidence, _ATTENTION_DROPOUT),
        ),
        "dropout on the output": Symptom(
            "config.attn_drop_rate drops channels of the output or of the values; it must drop "
            "attention weights, after the softmax.",
            "Most networks have dropout after a layer; here it removes connections between tokens",
            _drops_no_weights,
        ),
        "dropout before the softmax": Symptom(
            "Dropout is applied before the softmax, so no attention weight becomes zero.",
            "A score of zero is mistaken for a weight of zero, but exp(0) is 1",
            _drops_scores,
        ),
        "dropout with other weights": Symptom(
            "In training mode each attention weight must be either zero or the weight divided by "
            "1 - config.attn_drop_rate.",
            "The dropout rate is not config.attn_drop_rate, or the kept weights are not scaled up",
            _drops_wrongly,
        ),
        "weights returned after dropout": Symptom(
            "With return_weights=True the weights are returned after dropout; return them as they "
            "are after the softmax.",
            "The variable is overwritten with the result of dropout; nn.MultiheadAttention does "
            "the same in training mode",
            lambda evidence: _wrong_weights(evidence, _ATTENTION_DROPOUT, train=True),
        ),
    }),
    "Block": named({
        "LayerScale missing or misplaced": Symptom(
            "With config.init_values=0.1 the output is wrong: each branch goes through its "
            "LayerScale before the addition.",
            "init_values is not read, or LayerScale is applied to the sum",
            lambda evidence: _disagrees(evidence, _LAYER_SCALE),
        ),
        "no drop path": Symptom(
            "With drop_path=0.9 in training mode most images should skip both branches, but every "
            "image was changed.",
            "DropPath is not created with the rate or is used in one branch only; nn.Dropout drops "
            "single numbers instead of whole branches",
            lambda evidence: bool(_changed_images(evidence).all()),
        ),
        "drop path without residual": Symptom(
            "With drop_path=0.9 in training mode no image is changed at all.",
            "The rate is used as the probability of keeping a branch",
            lambda evidence: not _changed_images(evidence).any(),
        ),
    }),
    "VisionTransformer": named({
        "fails with one block": Symptom(
            "With depth=1 the output is wrong or the model cannot be built.",
            "The drop path rate of a block is divided by depth - 1, which is zero for one block",
            lambda evidence: not evidence.agrees(cases=(_ONE_BLOCK,)),
            method="__init__",
        ),
        "pre_logits ignored": Symptom(
            "With pre_logits=True `forward_head` must return what the head gets, (B, D).",
            "The argument is accepted, but not used",
            _ignores_pre_logits,
            method="forward_head",
        ),
        "wrong mean": Symptom(
            "With global_pool='avg' the output is wrong: the mean over the patch tokens, without "
            "the class token, goes through `fc_norm` and then the head.",
            "All tokens are averaged, or the norm is applied before the mean",
            lambda evidence: _disagrees(evidence, MEAN),
        ),
        "class token without class_token": Symptom(
            "With class_token=False the output is wrong: there are only patch tokens, and "
            "pos_embed has one position for each.",
            "The first token is left out although it is a patch",
            lambda evidence: _disagrees(evidence, _NO_TOKEN),
        ),
        "no dropout before the head": Symptom(
            "config.drop_rate has no effect in training mode.",
            "The dropout is not created, not called, or not given training=self.training",
            lambda evidence: _dropout_without_effect(evidence, _HEAD_DROPOUT),
        ),
        "dropout without drop_rate": Symptom(
            "The output changes at random in training mode although config.drop_rate is 0.",
            "The rate of the dropout is a number instead of config.drop_rate",
            _has_dropout,
        ),
        "dropout elsewhere": Symptom(
            "In training mode each feature that the head gets must be either zero or the feature "
            "divided by 1 - config.drop_rate.",
            "Dropout is applied to the logits or to the tokens, or the rate is not "
            "config.drop_rate",
            _drops_other_features,
            method="forward_head",
        ),
        "wrong drop path rates": Symptom(
            lambda evidence: "With drop_path_rate=0.4 the drop path rates of three blocks must be "
            f"0, 0.2 and 0.4, not {', '.join(f'{r:g}' for r in _drop_path_rates(evidence))}.",
            "Every block gets the same rate, or the last one does not get the full rate",
            lambda evidence: _drop_path_rates(evidence) not in ([], [0, 0.2, 0.4]),
            method="__init__",
        ),
        "init_weights() not called": Symptom(
            lambda evidence: "A new model does not have the initial values of init_weights(): the "
            "standard deviation of " + " and that of ".join(
                f"{name} is {value:.2g}" for name, value in _initial_deviations(evidence).items()
            ) + ", where both should be 0.02.",
            "The call is missing, or it is not the last line of __init__",
            lambda evidence: any(
                not 0.01 < value < 0.03 for value in _initial_deviations(evidence).values()
            ),
            method="__init__",
        ),
    }),
}  # fmt: skip
