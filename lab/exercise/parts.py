"""The parts of the exercise: what each one asks for, its hints, and what the hand-out leaves open.

A part is a class of model.py or a function of exercise/steps.py. The bodies that become TODOs are
listed here, so model.py itself needs no markers; other methods are handed out as they are.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Part:
    """One part: a class or a function that the student writes."""

    name: str  # of the class or function
    task: str  # one sentence: what it does
    hints: tuple[str, str, str]  # an idea, the shapes, pseudocode
    solution: str  # where a written solution can be read
    checks: tuple[str, ...]  # in the order in which they run
    todo: dict[str, str] = field(default_factory=dict)  # method or function: what to write there

    @property
    def is_function(self) -> bool:
        return self.name[0].islower()


PATCH_EMBED = Part(
    name="PatchEmbed",
    task="cut the images into patches and map each patch linearly to a token",
    hints=(
        "Every patch goes through the same linear map. A convolution whose kernel is as large as "
        "a patch, and which moves by a whole patch, does exactly that.",
        "(B, C, H, W) -> (B, D, H/P, W/P) -> (B, D, N) -> (B, N, D), with N = (H/P) * (W/P) and "
        "the patches row by row.",
        "One nn.Conv2d from in_chans to embed_dim, kernel_size and stride both patch_size; then "
        "flatten the last two axes and swap the last two axes of the result.",
    ),
    solution="timm.models.vision_transformer.PatchEmbed",
    checks=("shapes", "values", "gradients", "released weights"),
    todo={
        "__init__": "one linear map for all patches, called `proj`: a Conv2d, or a Linear after\n"
        "unfold. Keep self.patch_size, which other methods read",
        "forward": "(B, C, H, W) -> (B, N, D). Compute the number of patches with integer division",
    },
)
MLP = Part(
    name="MLP",
    task="apply two linear layers with an activation function between them to every token",
    hints=(
        "Every token is processed separately: widen, apply the activation function, narrow.",
        "(B, N, D) -> (B, N, mlp_ratio * D) -> (B, N, D). nn.Linear works on the last axis.",
        "Linear `fc1`, then the exact GELU (not its tanh approximation), then Linear `fc2`, and "
        "nothing after it.",
    ),
    solution="timm.models.vision_transformer.Mlp",
    checks=("shapes", "values", "gradients", "released weights"),
    todo={
        "__init__": "two linear layers, `fc1` and `fc2`; the hidden width is an int",
        "forward": "(B, N, D) -> (B, N, D), with the activation function from the paper",
    },
)
ATTENTION = Part(
    name="Attention",
    task="let the tokens of an image exchange information: multi-head self-attention",
    hints=(
        "Each token asks a question (its query) and compares it with what every token offers (the "
        "keys). The softmax turns each row of comparisons into weights, and the token takes the "
        "weighted mean of the values. Each head does this on its own d = D / h channels.",
        "qkv (B, N, 3D) -> (B, N, 3, h, d) -> q, k, v, each (B, h, N, d). Weights (B, h, N, N): "
        "rows are queries, columns are keys. Output (B, h, N, d) -> (B, N, h, d) -> (B, N, D).",
        "Multiply q by the transpose of k, divide by the square root of d, apply the softmax to "
        "the last axis, multiply by v. Move the head axis back behind the token axis before you "
        "merge heads, then apply `proj`.",
    ),
    solution="timm.models.vision_transformer.Attention",
    checks=("shapes", "values", "gradients", "options", "released weights"),
    todo={
        "__init__": "a linear layer `qkv` from D to 3D, with a bias if config.qkv_bias, and an\n"
        "output layer `proj`; the width of a head: integer division",
        "forward": "(B, N, D) -> (B, N, D). Dropout with config.attn_drop_rate on the weights,\n"
        "only in training mode. With return_weights: (output, weights before dropout)",
    },
)
BLOCK = Part(
    name="Block",
    task="combine attention and MLP into a pre-norm encoder block with residual connections",
    hints=(
        "Both halves do the same: normalize, process, add the result to the input.",
        "Everything is (B, N, D). There are two LayerNorms over the last axis, one per half.",
        "First half: x plus the attention of norm1 of x. Second half: the result plus the MLP of "
        "norm2 of that result. LayerScale and drop path go between a branch and its addition.",
    ),
    solution="timm.models.vision_transformer.Block",
    checks=("shapes", "values", "gradients", "options", "released weights"),
    todo={
        "__init__": "`norm1`, `attn`, `norm2`, `mlp`; eps of both norms: config.norm_eps. If\n"
        "config.init_values is set, `ls1` and `ls2`: LayerScale(config), else nothing.\n"
        "DropPath(drop_path) for both branches. LayerScale and DropPath are given above",
        "forward": "(B, N, D) -> (B, N, D)",
    },
)
VISION_TRANSFORMER = Part(
    name="VisionTransformer",
    task="put the model together: patches, class token, positions, blocks, norm, head",
    hints=(
        "The class token is one learned vector, the same for every image. It is put in "
        "front of the patch tokens, every token gets its position, and after the blocks the head "
        "reads only the class token.",
        "Images (B, C, H, W) -> patches (B, N, D) -> with the class token (B, N + 1, D), plus "
        "positions (1, N + 1, D) -> blocks -> norm -> class token (B, D) -> logits.",
        "Expand the class token to the batch, concatenate it in front along the token axis, add "
        "pos_embed, apply the blocks in order, then norm, take token 0, apply head. With "
        "global_pool='avg': the mean over the tokens from num_prefix_tokens on, fc_norm, head.",
    ),
    solution="timm.models.vision_transformer.VisionTransformer",
    checks=("shapes", "values", "gradients", "options", "released weights"),
    todo={
        "__init__": "`patch_embed`, `cls_token` (1, 1, D), `pos_embed` (1, N + 1, D), `blocks`,\n"
        "`norm`, `head`. Drop path rates: linear from 0 in the first block to\n"
        "config.drop_path_rate in the last; a single block has 0.\n"
        "With global_pool='avg', `norm` is nn.Identity() and `fc_norm` follows the mean.\n"
        "With class_token=False, `cls_token` is None and has no position.\n"
        "Keep self.config and self.num_prefix_tokens (0 or 1), which the scripts and other\n"
        "methods read; end with self.init_weights(). `no_embed_class` is not checked",
        "embed": "images to the tokens that enter the first block",
        "forward_features": "images to all tokens after the last block and `norm`",
        "forward_head": "tokens to logits: take the class token, or with global_pool='avg' the\n"
        "mean over the patch tokens followed by `fc_norm`; then dropout with\n"
        "config.drop_rate, then `head`.\n"
        "With pre_logits=True, return the input of `head`",
    },
)
TRAINING_STEP = Part(
    name="training_step",
    task="update a model once on one batch",
    hints=(
        "Gradients accumulate until you clear them, and dropout is active only in train mode.",
        "logits (B, num_classes) and labels (B,) -> a scalar loss -> a Python float.",
        "Set train mode, compute the cross-entropy of the logits (it contains the softmax), clear "
        "the gradients, backpropagate, let the optimizer step, return the loss as a number.",
    ),
    solution="lab/training/loop.py",
    checks=("loss", "update", "train mode"),
    todo={"training_step": "one update, with the gradients of this batch only"},
)
EVALUATE = Part(
    name="evaluate",
    task="measure the accuracy of a model on a validation split",
    hints=(
        "Validation must be repeatable: nothing random in the model, nothing random in the data.",
        "logits (B, num_classes) -> predictions (B,) -> compare with labels (B,). Count correct "
        "predictions and images over all batches; the last batch may be smaller.",
        "Set eval mode, switch gradients off, transform with eval_transform, take the argmax over "
        "classes, add up correct predictions and images, divide once at the end.",
    ),
    solution="lab/training/evaluation.py",
    checks=("accuracy", "eval mode", "no gradients"),
    todo={"evaluate": "every image counts once, nothing random, no gradients"},
)
REPLACE_HEAD = Part(
    name="replace_head",
    task="give a pretrained model a new head and freeze everything else",
    hints=(
        "A parameter is frozen when its requires_grad is False. A new layer starts trainable.",
        "The old head maps D to the old classes, the new one D to num_classes.",
        "Set requires_grad to False for every parameter (setting it on the model has no effect), "
        "and only then replace model.head with a new nn.Linear with the same in_features.",
    ),
    solution="lab/finetuning/modes.py",
    checks=("new head", "frozen layers"),
    todo={"replace_head": "freeze what is there, then put in a new output layer"},
)
_ALL = (
    PATCH_EMBED, MLP, ATTENTION, BLOCK, VISION_TRANSFORMER, TRAINING_STEP, EVALUATE, REPLACE_HEAD,
)  # fmt: skip
PARTS = {part.name: part for part in _ALL}
