"""The library of mistakes in Block and VisionTransformer; MISTAKES has those of all parts."""

from typing import Any

import torch.nn.functional as F
from torch import nn

from lab.exercise.layer_mistakes import ATTENTION, MLP, PATCH_EMBED
from lab.exercise.reference import Mistake, named


class _OverTokens(nn.LayerNorm):
    """A LayerNorm that takes its mean and variance over tokens instead of channels."""

    def forward(self, x):
        return F.layer_norm(x.mT, x.shape[1:2], eps=self.eps).mT * self.weight + self.bias


def _norm_over_tokens(block: nn.Module, config: Any) -> None:
    block.norm1.__class__ = block.norm2.__class__ = _OverTokens  # keeps the parameters


def _default_eps(block: nn.Module, config: Any) -> None:
    block.norm1.eps = block.norm2.eps = 1e-5


_BRANCH1, _BRANCH2 = "x + self.drop_path1(", "x + self.drop_path2("
BLOCK = {
    "missing residual around attention": Mistake(
        "The attention's output replaces the tokens instead of being added to them.",
        "x + is forgotten in the first half",
        {_BRANCH1: "self.drop_path1("},
    ),
    "missing residual around the MLP": Mistake(
        "The MLP's output replaces the tokens instead of being added to them.",
        "x + is forgotten in the second half",
        {_BRANCH2: "self.drop_path2("},
    ),
    "no residual connections": Mistake(
        "Both branches replace the tokens, so a deep model does not train.",
        "The block is written as a chain of layers",
        {_BRANCH1: "self.drop_path1(", _BRANCH2: "self.drop_path2("},
    ),
    "doubled residual around attention": Mistake(
        "The tokens are added twice in the first half.",
        "Attention was written with a residual connection as well",
        {_BRANCH1: "x + x + self.drop_path1("},
    ),
    "doubled residual around the MLP": Mistake(
        "The tokens are added twice in the second half.",
        "The MLP was written with a residual connection as well",
        {_BRANCH2: "x + x + self.drop_path2("},
    ),
    "post-norm": Mistake(
        "The norms come after the additions, as in the Transformer of 2017; ViT is pre-norm.",
        "The figure of the original Transformer has 'Add & Norm' after each branch",
        {"self.norm1(x)": "x", "self.norm2(x)": "x", "return x": "return self.norm2(x)",
         "x = " + _BRANCH2: "x = self.norm1(x)\n    x = " + _BRANCH2},
    ),
    "norm after the branch": Mistake(
        "Each norm is applied to the branch's output before the addition, as in Swin v2.",
        "The norm is written around the branch instead of inside",
        forward=lambda m, x: (y := x + m.norm1(m.attn(x))) + m.norm2(m.mlp(y)),
    ),
    "norm added back": Mistake(
        "The residual connection starts after the norm: norm(x) + branch(norm(x)).",
        "x is overwritten by its normalized value before the addition",
        forward=lambda m, x: (y := (z := m.norm1(x)) + m.attn(z), z := m.norm2(y))[1] + m.mlp(z),
    ),
    "one shared norm": Mistake(
        "Both halves use the same LayerNorm; the paper has one for each.",
        "A LayerNorm looks like a function, but it has a weight and a bias",
        change=lambda m, c: setattr(m, "norm2", m.norm1),
    ),
    "norm1 used twice": Mistake(
        "The second half is normalized by norm1, and norm2 is never used.",
        "The line of the first half is copied",
        {"self.norm2(x)": "self.norm1(x)"},
    ),
    "no norm before attention": Mistake(
        "Attention reads the tokens without normalization.",
        "norm1 is created in __init__ but not called in forward",
        {"self.attn(self.norm1(x)": "self.attn(x"},
    ),
    "no norm before the MLP": Mistake(
        "The MLP reads the tokens without normalization.",
        "norm2 is created in __init__ but not called in forward",
        {"self.mlp(self.norm2(x)": "self.mlp(x"},
    ),
    "norm over tokens": Mistake(
        "Mean and variance are taken over the tokens (axis 1) instead of a token's channels.",
        "The wrong axis is normalized",
        change=_norm_over_tokens,
    ),
    "wrong eps": Mistake(
        "The norms use PyTorch's eps of 1e-5 instead of config.norm_eps.",
        "nn.LayerNorm is created without eps; ViT has 1e-6, and released weights expect it",
        change=_default_eps,
    ),
    "MLP before attention": Mistake(
        "The MLP comes first.",
        "The order of the two halves is mixed up",
        forward=lambda m, x: (y := x + m.mlp(m.norm1(x))) + m.attn(m.norm2(y)),
    ),
    "second residual from the block's input": Mistake(
        "The MLP's output is added to the block's input, so attention only acts through the MLP.",
        "The input is kept in a variable that is not updated",
        forward=lambda m, x: x + m.mlp(m.norm2(x + m.attn(m.norm1(x)))),
    ),
    "parallel branches": Mistake(
        "Attention and MLP both read the block's input, and both results are added to it.",
        "The two lines are merged into one sum",
        forward=lambda m, x: x + m.attn(m.norm1(x)) + m.mlp(m.norm2(x)),
    ),
}  # fmt: skip

_EXPAND, _CAT, _ADD = ".expand(x.shape[0], -1, -1)", "to_cat + [x]", "x = x + pos_embed"
_POOL = "x = self.pool(x)"
VISION_TRANSFORMER = {
    "positions added twice": Mistake(
        "The position embedding is added twice.",
        "It is added both where the tokens are made and before the blocks",
        {_ADD: "x = x + pos_embed + pos_embed"},
    ),
    "positions not added": Mistake(
        "The position embedding is never added, so the order of the patches does not matter.",
        "pos_embed is created in __init__ but not used",
        {_ADD: "x = x"},
    ),
    "positions added before the class token": Mistake(
        "Only the patches get positions; the class token is put in front afterwards without one.",
        "The two steps are in the wrong order",
        {_CAT: "to_cat + [x + pos_embed[:, 1:]]", _ADD: "x = x"},
    ),
    "positions shifted by one": Mistake(
        "The patches get the first N positions, which include the class token's.",
        "Positions are added before the class token is, and position 0 is not skipped",
        {_CAT: "to_cat + [x + pos_embed[:, :-1]]", _ADD: "x = x"},
    ),
    "class token appended": Mistake(
        "The class token comes last, but the head reads the first token.",
        "The order of the arguments of torch.cat is mixed up",
        {_CAT: "[x] + to_cat"},
    ),
    "class token at the end": Mistake(
        "The class token comes last and is read there, so positions are shifted by one.",
        "Where the token is does not matter for training, but it does for released weights",
        {_CAT: "[x] + to_cat", _POOL: "x = x[:, -1]"},
    ),
    "class token not expanded": Mistake(
        "The class token has a batch axis of one, so this works for one image only.",
        "torch.cat does not broadcast, unlike +",
        {_EXPAND: ""},
    ),
    "class token without parameter": Mistake(
        "There is no parameter for the class token; zeros are put in front.",
        "The token is seen as an empty slot, but it is learned",
        {"if self.cls_token is not None:": "if self.has_class_token:",
         "self.cls_token" + _EXPAND: "x.new_zeros(x.shape[0], 1, x.shape[2])"},
        change=lambda m, c: m.register_parameter("cls_token", None),
    ),
    "mean over all tokens": Mistake(
        "The head reads the mean over all tokens, the class token included.",
        "CNNs usually end with global average pooling",
        {_POOL: "x = x.mean(dim=1)"},
    ),
    "mean over the patches": Mistake(
        "The head reads the mean over the patch tokens instead of the class token.",
        "Both exist in the literature; global_pool='token' is the class token",
        {_POOL: "x = x[:, 1:].mean(dim=1)"},
    ),
    "head on the last token": Mistake(
        "The head reads the last token.",
        "A language model predicts from the last token",
        {_POOL: "x = x[:, -1]"},
    ),
    "head on every token": Mistake(
        "The head is applied to all tokens, so the output is (B, N, num_classes).",
        "The class token is not selected",
        {_POOL: "x = x"},
    ),
    "softmax before the loss": Mistake(
        "The model returns probabilities, and the cross-entropy applies a second softmax.",
        "The output is thought of as a distribution; the loss expects logits",
        {"self.head(x)": "self.head(x).softmax(-1)"},
    ),
    "no final norm": Mistake(
        "The tokens reach the head without the final norm.",
        "norm is created in __init__ but not called",
        {"x = self.norm(x)": "x = x"},
    ),
    "norm before the blocks": Mistake(
        "The norm is applied before the blocks instead of after them.",
        "Pre-norm is taken literally",
        {"x = self.norm_pre(x)": "x = self.norm(x)",
         "    x = self.norm(x)\n    return x": "    return x"},
    ),
    "wrong eps in the final norm": Mistake(
        "The final norm uses PyTorch's eps of 1e-5 instead of config.norm_eps.",
        "nn.LayerNorm is created without eps",
        change=lambda m, c: setattr(m.norm, "eps", 1e-5),
    ),
    "blocks share their weights": Mistake(
        "The same block is used several times.",
        "[Block(config)] * depth repeats one object",
        change=lambda m, c: setattr(m, "blocks", nn.Sequential(*[m.blocks[0]] * c.depth)),
    ),
    "only the first block used": Mistake(
        "Only the first block is applied.",
        "A return is inside the loop",
        {"x = self.blocks(x)": "x = self.blocks[0](x)"},
    ),
    "only the last block used": Mistake(
        "Every block reads the embedded patches, so only the last one counts.",
        "The loop assigns to a different variable from the one it reads",
        {"x = self.blocks(x)": "x = self.blocks[-1](x)"},
    ),
    "dropout before the head active in eval mode": Mistake(
        "The class token is dropped in eval mode too, so every prediction is random.",
        "F.dropout drops in eval mode too unless it is given training=self.training",
        {"x = self.head_drop(x)": "x = nn.functional.dropout(x, self.head_drop.p)"},
    ),
    "class token detached": Mistake(
        "The class token is used through .data or detach(), so it is never learned.",
        "A copy of the parameter is expanded instead of the parameter",
        {"self.cls_token" + _EXPAND: "self.cls_token.detach()" + _EXPAND},
    ),
    "positions detached": Mistake(
        "The position embedding is used through .data or detach(), so it is never learned.",
        "A copy of the parameter is added instead of the parameter",
        {_ADD: "x = x + pos_embed.detach()"},
    ),
}  # fmt: skip

MISTAKES: dict[str, tuple[Mistake, ...]] = {
    "PatchEmbed": named(PATCH_EMBED),
    "MLP": named(MLP),
    "Attention": named(ATTENTION),
    "Block": named(BLOCK),
    "VisionTransformer": named(VISION_TRANSFORMER),
}
