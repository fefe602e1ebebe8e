"""The library of mistakes in PatchEmbed, MLP and Attention, as edits of timm's modules.

Each entry says what the code does, what follows, and how somebody gets there. A submission is
recognized by what it computes, not by how it is written: see checks.py. Block and
VisionTransformer are in model_mistakes.py. Mistakes that only raise an exception, or only show in
training, are in symptoms.py and options.py.
"""

from typing import Any

from torch import nn

from lab.exercise.reference import Mistake

_RESHAPE = "reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)"
_UNBIND = "q, k, v = qkv.unbind(0)"
_WRONG_SPLIT = {
    _RESHAPE: "chunk(3, -1)",
    _UNBIND: "q, k, v = (t.reshape(B, self.num_heads, N, self.head_dim) for t in qkv)",
}
_PROJ = "x = self.proj(x)"
_TOKENS = "x.flatten(2).transpose(1, 2)"
SCALE = "q = q * self.scale"


class _Apply(nn.Module):
    """A function as a module, for changes that put one in place of a layer."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def _four_times_as_wide(mlp: nn.Module, config: Any) -> None:
    width = config.embed_dim
    mlp.fc1, mlp.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)


PATCH_EMBED = {
    "column-major patches": Mistake(
        "The patches are numbered column by column instead of row by row, so positions and "
        "attention maps are transposed.",
        "Width is written before height, as in (x, y) coordinates",
        {_TOKENS: "x.mT.flatten(2).transpose(1, 2)"},
    ),
    "height and width swapped": Mistake(
        "The images are transposed before they are cut, so the pixels inside each patch are "
        "transposed too.",
        "Images are assumed to be (B, C, W, H)",
        {_PROJ: "x = self.proj(x.mT)", _TOKENS: "x.mT.flatten(2).transpose(1, 2)"},
    ),
    "channels not moved to the last axis": Mistake(
        "The output is (B, D, N): the transpose after flatten is missing.",
        "A convolution keeps channels on axis 1, and flatten(2) does not change that",
        {_TOKENS: "x.flatten(2)"},
    ),
    "reshape instead of transpose": Mistake(
        "The shape is right, but reshape does not move the channels to the last axis: each token "
        "mixes numbers of many patches.",
        "(B, D, N) is read as (B, N, D), which has the same number of elements",
        {_TOKENS: "x.flatten(2).reshape(B, -1, x.shape[1])"},
    ),
    "patches not flattened": Mistake(
        "The output still has two axes for the patches, (B, H/P, W/P, D).",
        "The grid looks like an image, but attention needs one axis of tokens",
        {_TOKENS: "x.permute(0, 2, 3, 1)"},
    ),
    "stride of one": Mistake(
        "The convolution moves by one pixel, so there is a token for every position of the window.",
        "nn.Conv2d has stride 1 unless it is given",
        change=lambda m, c: setattr(m.proj, "stride", (1, 1)),
    ),
    "overlapping patches": Mistake(
        "The stride is half a patch, so neighboring patches overlap and there are too many tokens.",
        "Windows of convolutions usually overlap; patches of a ViT do not",
        change=lambda m, c: setattr(m.proj, "stride", (c.patch_size // 2,) * 2),
    ),
    "padded convolution": Mistake(
        "The image is padded by one pixel, so every patch is shifted and contains zeros.",
        "padding=1 is copied from a CNN, where it keeps the size",
        change=lambda m, c: setattr(m.proj, "padding", (1, 1)),
    ),
    "image reshaped into patches": Mistake(
        "The image is reshaped to (B, N, C*P*P) without cutting it, so a token holds a few full "
        "rows of one channel instead of a square patch.",
        "The numbers of elements agree, and reshape does not complain",
        {_PROJ: "x = F.linear(x.reshape(B, -1, self.proj.weight[0].numel()), "
                "self.proj.weight.flatten(1), self.proj.bias).mT.unflatten(2, (-1, 1))"},
    ),
    "unfold without transpose": Mistake(
        "The result of unfold, (B, C*P*P, N), is reshaped to (B, N, C*P*P) instead of transposed, "
        "so each token mixes pixels of many patches.",
        "unfold puts the patches on the last axis",
        {_PROJ: "x = F.linear(F.unfold(x, self.patch_size, stride=self.patch_size)"
                ".reshape(B, -1, self.proj.weight[0].numel()), "
                "self.proj.weight.flatten(1), self.proj.bias).mT.unflatten(2, (-1, 1))"},
    ),
}  # fmt: skip

MLP = {
    "ReLU instead of GELU": Mistake(
        "The activation function is ReLU.",
        "ReLU is the default of many networks; the ViT paper uses GELU",
        change=lambda m, c: setattr(m, "act", nn.ReLU()),
    ),
    "tanh approximation of GELU": Mistake(
        "The activation is GELU's tanh approximation, which differs in the fourth digit.",
        "GPT-2 and some libraries use it; the ViT paper and released weights use the exact GELU",
        change=lambda m, c: setattr(m, "act", nn.GELU("tanh")),
    ),
    "sigmoid approximation of GELU": Mistake(
        "The activation is x * sigmoid(1.702 x), the QuickGELU of CLIP.",
        "CLIP's code is a common template for a ViT",
        change=lambda m, c: setattr(m, "act", _Apply(lambda x: x * (1.702 * x).sigmoid())),
    ),
    "SiLU instead of GELU": Mistake(
        "The activation function is SiLU (Swish).",
        "Newer language models use SiLU",
        change=lambda m, c: setattr(m, "act", nn.SiLU()),
    ),
    "no activation function": Mistake(
        "There is no activation, so the two linear layers collapse into one.",
        "The activation is created in __init__ but not called in forward",
        change=lambda m, c: setattr(m, "act", nn.Identity()),
    ),
    "activation after the last layer": Mistake(
        "A second activation follows fc2, so the output has almost no negative values.",
        "Linear and activation are written as a pair, twice",
        {"x = self.drop2(x)": "x = self.act(x)"},
    ),
    "activation at the end instead of the middle": Mistake(
        "The activation comes after fc2 and not between the layers.",
        "The order of the calls in forward is mixed up",
        {"x = self.act(x)": "x = x", "x = self.drop2(x)": "x = self.act(x)"},
    ),
    "missing second linear layer": Mistake(
        "There is no fc2: the output has the hidden width instead of the embedding width.",
        "The MLP is assumed to end with the activation",
        change=lambda m, c: setattr(m, "fc2", nn.Identity()),
    ),
    "hidden width always four times the embedding width": Mistake(
        "The hidden width ignores config.mlp_ratio.",
        "The paper's 4 is written into the code",
        change=_four_times_as_wide,
    ),
    "residual connection inside the MLP": Mistake(
        "The MLP adds its input to its output, and the block adds it a second time.",
        "The residual connection belongs to the block",
        {"x = self.fc1(x)": "start = x\n    x = self.fc1(x)", "return x": "return start + x"},
    ),
    "dropout active in eval mode in the MLP": Mistake(
        "A tenth of the output is dropped in eval mode too, so every prediction is random.",
        "F.dropout drops in eval mode too unless it is given training=self.training",
        {"x = self.drop2(x)": "x = nn.functional.dropout(x, 0.1)"},
    ),
}  # fmt: skip


ATTENTION = {
    "softmax over queries": Mistake(
        "The softmax runs over axis -2, so weights sum to one over queries and not over keys.",
        "Both axes have N elements, so the wrong one raises no error",
        {"softmax(dim=-1)": "softmax(dim=-2)"},
    ),
    "softmax over heads": Mistake(
        "The softmax runs over axis 1: the heads compete, and a token's weights do not sum to one.",
        "dim=1 is the channel axis in most networks; here it is the head axis",
        {"softmax(dim=-1)": "softmax(dim=1)"},
    ),
    "no softmax": Mistake(
        "The scores are used as weights without a softmax.",
        "The scaled scores are mistaken for attention weights",
        {"attn = attn.softmax(dim=-1)": "attn = attn"},
    ),
    "missing 1/sqrt(d)": Mistake(
        "The scores are not divided by sqrt(d), so the softmax saturates.",
        "Scaled dot-product attention is written without the scaling",
        {SCALE: "q = q"},
    ),
    "1/sqrt(D) instead of 1/sqrt(d)": Mistake(
        "The scores are divided by the square root of the embedding width, not of a head's width.",
        "With several heads, queries and keys have D / h channels",
        {SCALE: "q = q * (self.num_heads * self.head_dim) ** -0.5"},
    ),
    "1/d instead of 1/sqrt(d)": Mistake(
        "The scores are divided by d, so the weights are almost uniform.",
        "The square root is forgotten",
        {SCALE: "q = q / self.head_dim"},
    ),
    "sqrt(d) multiplied instead of divided": Mistake(
        "The scores are multiplied by sqrt(d), so the softmax saturates.",
        "The scale is defined as d ** 0.5 and used as a factor",
        {SCALE: "q = q * self.head_dim ** 0.5"},
    ),
    "scaled after the softmax": Mistake(
        "The weights are divided by sqrt(d) instead of the scores, so they sum to 1/sqrt(d).",
        "The factor is put at the end of the line",
        {SCALE: "q = q", "softmax(dim=-1)": "softmax(dim=-1) * self.scale"},
    ),
    "q and k swapped": Mistake(
        "Queries and keys change places, so the scores are transposed before the softmax.",
        "The first two thirds of qkv are unpacked in the wrong order, or k is multiplied by q^T",
        {_UNBIND: "k, q, v = qkv.unbind(0)"},
    ),
    "v replaced by k": Mistake(
        "The weights are applied to the keys, and the values are never used.",
        "A variable is mistyped",
        {"attn @ v": "attn @ k"},
    ),
    "k and v swapped": Mistake(
        "Queries are compared with the values, and the keys are averaged.",
        "qkv is unpacked as q, v, k",
        {_UNBIND: "q, v, k = qkv.unbind(0)"},
    ),
    "weights transposed": Mistake(
        "The values are multiplied by the transposed weights.",
        "Rows and columns of the weights are mixed up: rows belong to queries",
        {"attn @ v": "attn.mT @ v"},
    ),
    "heads split without transpose": Mistake(
        "The tokens are reshaped to (B, h, N, d) directly, so a head gets pieces of several tokens "
        "instead of some channels of each token.",
        "The shape is right; the axes must be split as (N, h, d) first and then transposed",
        _WRONG_SPLIT,
    ),
    "heads not merged back": Mistake(
        "The heads are reshaped to (B, N, D) without moving the head axis behind the token axis.",
        "The shape is right; the axes must be transposed before they are merged",
        {"x.transpose(1, 2).reshape": "x.reshape"},
    ),
    "heads split and merged without transpose": Mistake(
        "The tokens are reshaped to (B, h, N, d) and back, so a head sees pieces of tokens.",
        "Splitting and merging undo each other, so the result looks plausible",
        _WRONG_SPLIT | {"x.transpose(1, 2).reshape": "x.reshape"},
    ),
    "channels of a head interleaved": Mistake(
        "The channels are split as (d, h) instead of (h, d), so a head takes every h-th channel.",
        "Both orders give the same shapes",
        {_RESHAPE: "reshape(B, N, 3, self.head_dim, self.num_heads).permute(2, 0, 4, 1, 3)"},
    ),
    "qkv layout (h, 3, d)": Mistake(
        "The channels of qkv are read as heads, then q, k, v, so released weights do not fit.",
        "Both orders can be trained; timm and the paper's weights have q, k, v first",
        {_RESHAPE: "reshape(B, N, self.num_heads, 3, self.head_dim).permute(3, 0, 2, 1, 4)"},
    ),
    "qkv layout (h, d, 3)": Mistake(
        "The channels of qkv are read with q, k, v as the last axis.",
        "The new axis is put at the end of the reshape",
        {_RESHAPE: "reshape(B, N, self.num_heads, self.head_dim, 3).permute(4, 0, 2, 1, 3)"},
    ),
    "attention across the batch": Mistake(
        "Tokens attend to the same token of the other images instead of the tokens of their image.",
        "nn.MultiheadAttention has the batch on axis 1 unless batch_first=True",
        {"B, N, C = x.shape": "x = x.transpose(0, 1)\n    B, N, C = x.shape",
         "return x": "return x.transpose(0, 1)"},
    ),
    "attention between heads": Mistake(
        "Each token's heads attend to each other, and tokens never exchange information.",
        "The heads are not transposed: q, k and v are (B, N, h, d)",
        {_RESHAPE: "reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 1, 3, 4)",
         "x.transpose(1, 2).reshape": "x.reshape"},
    ),
    "one head": Mistake(
        "There is one head of width D: num_heads is ignored.",
        "The first version, with a single head, is kept",
        change=lambda m, c: vars(m).update(
            num_heads=1, head_dim=c.embed_dim, scale=c.embed_dim**-0.5),
    ),
    "output projection not used": Mistake(
        "The merged heads are returned without the output layer.",
        "proj is created in __init__ but not called in forward",
        {_PROJ: "x = x"},
    ),
    "causal mask": Mistake(
        "Each token sees only itself and the tokens before it.",
        "Language models mask the future; in an image every patch attends to every other",
        {"attn = attn.softmax": "attn = attn + torch.full((N, N), -torch.inf).triu(1)\n"
                              "        attn = attn.softmax"},
    ),
    "residual connection inside of attention": Mistake(
        "Attention adds its input to its output, and the block adds it a second time.",
        "The residual connection belongs to the block",
        {"B, N, C = x.shape": "start = x\n    B, N, C = x.shape", "return x": "return start + x"},
    ),
    "dropout active in eval mode": Mistake(
        "The weights are dropped in eval mode too, so every prediction is random.",
        "F.dropout drops in eval mode too unless it is given training=self.training",
        {"attn = self.attn_drop(attn)": "attn = F.dropout(attn, self.attn_drop.p)"},
    ),
    "detached weights": Mistake(
        "The weights are cut out of the graph, so queries and keys get no gradient.",
        "A detach() that is needed to plot the weights is left in",
        {"x = attn @ v": "x = attn.detach() @ v"},
    ),
}  # fmt: skip
