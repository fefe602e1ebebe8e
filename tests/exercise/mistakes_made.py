"""Every mistake of the library as a student makes it: edits of student.py, written independently.

Each entry is a list of (old, new); `old` occurs once in the part.
"""

MADE = {
    "PatchEmbed": {
        "column-major patches": [("x.permute(0, 2, 3, 1)", "x.permute(0, 3, 2, 1)")],
        "height and width swapped": [
            ("x = self.proj(x)", "x = self.proj(x.transpose(2, 3)).transpose(2, 3)"),
        ],
        "channels not moved to the last axis": [
            ("x = x.permute(0, 2, 3, 1)", ""),
            ("x.reshape(B, -1, D)", "x.reshape(B, D, -1)"),
        ],
        "reshape instead of transpose": [("x = x.permute(0, 2, 3, 1)", "")],
        "patches not flattened": [("x = x.reshape(B, -1, D)", "")],
        "stride of one": [(", stride=P", "")],
        "overlapping patches": [("stride=P", "stride=P // 2")],
        "padded convolution": [("stride=P", "stride=P, padding=1")],
        "image reshaped into patches": [
            ("x = self.proj(x)", "w = self.proj.weight.flatten(1)\n"
             "        p = x.view(B, -1, w.shape[1])"),
            ("D = x.shape[1]", "return p @ w.T + self.proj.bias"),
            ("x = x.permute(0, 2, 3, 1)", ""), ("x = x.reshape(B, -1, D)", ""),
        ],
        "unfold without transpose": [
            ("x = self.proj(x)", "w = self.proj.weight.flatten(1)\n"
             "        p = F.unfold(x, self.patch_size, stride=self.patch_size)"),
            ("D = x.shape[1]", "return p.view(B, -1, w.shape[1]) @ w.T + self.proj.bias"),
            ("x = x.permute(0, 2, 3, 1)", ""), ("x = x.reshape(B, -1, D)", ""),
        ],
    },
    "MLP": {
        "ReLU instead of GELU": [("F.gelu(h)", "torch.relu(h)")],
        "tanh approximation of GELU": [
            ("h = F.gelu(h)", "t = torch.tanh((2 / math.pi) ** 0.5 * (h + 0.044715 * h**3))\n"
             "        h = 0.5 * h * (1 + t)"),
        ],
        "sigmoid approximation of GELU": [("F.gelu(h)", "h * torch.sigmoid(1.702 * h)")],
        "SiLU instead of GELU": [("F.gelu(h)", "h * torch.sigmoid(h)")],
        "no activation function": [("h = F.gelu(h)", "")],
        "activation after the last layer": [("return h", "return F.gelu(h)")],
        "activation at the end instead of the middle": [
            ("h = F.gelu(h)", ""), ("return h", "return F.gelu(h)"),
        ],
        "missing second linear layer": [
            ("self.fc2 = nn.Linear(hidden, D)", ""), ("h = self.fc2(h)", ""),
        ],
        "hidden width always four times the embedding width": [
            ("int(D * config.mlp_ratio)", "4 * D"),
        ],
        "residual connection inside the MLP": [("return h", "return h + x")],
        "dropout active in eval mode in the MLP": [("return h", "return F.dropout(h, 0.1)")],
    },
    "Attention": {
        "softmax over queries": [("dim=3", "dim=2")],
        "softmax over heads": [("dim=3", "dim=1")],
        "no softmax": [("torch.softmax(scores, dim=3)", "scores")],
        "missing 1/sqrt(d)": [(" / math.sqrt(self.d)", "")],
        "1/sqrt(D) instead of 1/sqrt(d)": [("math.sqrt(self.d)", "math.sqrt(D)")],
        "1/d instead of 1/sqrt(d)": [("math.sqrt(self.d)", "self.d")],
        "sqrt(d) multiplied instead of divided": [("/ math.sqrt", "* math.sqrt")],
        "scaled after the softmax": [
            (" / math.sqrt(self.d)", ""), ("dim=3)", "dim=3) / math.sqrt(self.d)"),
        ],
        "q and k swapped": [("q @ k.transpose(2, 3)", "k @ q.transpose(2, 3)")],
        "v replaced by k": [("dropped @ v", "dropped @ k")],
        "k and v swapped": [("q, k, v = self.qkv", "q, v, k = self.qkv")],
        "weights transposed": [("dropped @ v", "dropped.transpose(2, 3) @ v")],
        "heads split without transpose": [
            (f"{t}.reshape(B, N, self.h, self.d).transpose(1, 2)",
             f"{t}.reshape(B, self.h, N, self.d)") for t in "qkv"
        ],
        "heads not merged back": [("out.transpose(1, 2).reshape", "out.reshape")],
        "heads split and merged without transpose": [
            *((f"{t}.reshape(B, N, self.h, self.d).transpose(1, 2)",
               f"{t}.reshape(B, self.h, N, self.d)") for t in "qkv"),
            ("out.transpose(1, 2).reshape", "out.reshape"),
        ],
        "channels of a head interleaved": [
            (f"{t}.reshape(B, N, self.h, self.d).transpose(1, 2)",
             f"{t}.reshape(B, N, self.d, self.h).permute(0, 3, 1, 2)") for t in "qkv"
        ],
        "qkv layout (h, 3, d)": [
            ("self.qkv(x).split(D, dim=-1)",
             "self.qkv(x).view(B, N, self.h, 3, self.d).unbind(3)"),
        ],
        "qkv layout (h, d, 3)": [
            ("self.qkv(x).split(D, dim=-1)",
             "self.qkv(x).view(B, N, self.h, self.d, 3).unbind(4)"),
        ],
        "attention across the batch": [
            ("B, N, D = x.shape", "x = x.transpose(0, 1)\n        B, N, D = x.shape"),
            ("out = self.proj(out)", "out = self.proj(out).transpose(0, 1)"),
        ],
        "attention between heads": [
            *((f"{t}.reshape(B, N, self.h, self.d).transpose(1, 2)",
               f"{t}.reshape(B, N, self.h, self.d)") for t in "qkv"),
            ("out.transpose(1, 2).reshape", "out.reshape"),
        ],
        "one head": [("self.h = config.num_heads", "self.h = 1")],
        "output projection not used": [("out = self.proj(out)", "")],
        "causal mask": [
            ("math.sqrt(self.d)", "math.sqrt(self.d)\n        future = torch.ones(N, N, "
             "dtype=torch.bool).triu(1)\n        scores = scores.masked_fill(future, -math.inf)"),
        ],
        "residual connection inside of attention": [
            ("out = self.proj(out)", "out = x + self.proj(out)"),
        ],
        "dropout active in eval mode": [(", self.training)", ")")],
        "detached weights": [("dropped @ v", "dropped.detach() @ v")],
    },
    "Block": {
        "missing residual around attention": [
            ("x = x + self.drop(self.ls1(a))", "x = self.drop(self.ls1(a))"),
        ],
        "missing residual around the MLP": [
            ("x = x + self.drop(self.ls2(m))", "x = self.drop(self.ls2(m))"),
        ],
        "no residual connections": [
            ("x = x + self.drop(self.ls1(a))", "x = self.drop(self.ls1(a))"),
            ("x = x + self.drop(self.ls2(m))", "x = self.drop(self.ls2(m))"),
        ],
        "doubled residual around attention": [("self.attn(self.norm1(x))",
                                               "x + self.attn(self.norm1(x))")],
        "doubled residual around the MLP": [("self.mlp(self.norm2(x))",
                                             "x + self.mlp(self.norm2(x))")],
        "post-norm": [
            ("self.attn(self.norm1(x))", "self.attn(x)"),
            ("x = x + self.drop(self.ls1(a))", "x = self.norm1(x + self.drop(self.ls1(a)))"),
            ("self.mlp(self.norm2(x))", "self.mlp(x)"),
            ("x = x + self.drop(self.ls2(m))", "x = self.norm2(x + self.drop(self.ls2(m)))"),
        ],
        "norm after the branch": [
            ("self.attn(self.norm1(x))", "self.norm1(self.attn(x))"),
            ("self.mlp(self.norm2(x))", "self.norm2(self.mlp(x))"),
        ],
        "norm added back": [
            ("a = self.attn(self.norm1(x))", "x = self.norm1(x)\n        a = self.attn(x)"),
            ("m = self.mlp(self.norm2(x))", "x = self.norm2(x)\n        m = self.mlp(x)"),
        ],
        "one shared norm": [
            ("self.norm1 = ", "self.norm = "), ("self.norm2 = nn.LayerNorm(D, eps=1e-6)", ""),
            ("self.norm1(x)", "self.norm(x)"), ("self.norm2(x)", "self.norm(x)"),
        ],
        "norm1 used twice": [("self.norm2(x)", "self.norm1(x)")],
        "no norm before attention": [("self.norm1(x)", "x")],
        "no norm before the MLP": [("self.norm2(x)", "x")],
        "norm over tokens": [
            (f"self.norm{i}(x)", f"(((x - x.mean(1, keepdim=True)) / torch.sqrt(x.var(1, "
             f"unbiased=False, keepdim=True) + 1e-6)) * self.norm{i}.weight + self.norm{i}.bias)")
            for i in (1, 2)
        ],
        "wrong eps": [
            ("self.norm1 = nn.LayerNorm(D, eps=1e-6)", "self.norm1 = nn.LayerNorm(D)"),
            ("self.norm2 = nn.LayerNorm(D, eps=1e-6)", "self.norm2 = nn.LayerNorm(D)"),
        ],
        "MLP before attention": [
            ("self.attn(self.norm1(x))", "self.mlp(self.norm1(x))"),
            ("m = self.mlp(self.norm2(x))", "m = self.attn(self.norm2(x))"),
        ],
        "second residual from the block's input": [
            ("x = x + self.drop(self.ls1(a))", "y = x + self.drop(self.ls1(a))"),
            ("self.norm2(x)", "self.norm2(y)"),
        ],
        "parallel branches": [
            ("x = x + self.drop(self.ls1(a))", ""),
            ("x = x + self.drop(self.ls2(m))", "x = x + a + m"),
        ],
    },
    "VisionTransformer": {
        "positions added twice": [
            ("x = self.embed(x)", "x = self.embed(x) + self.pos_embed"),
        ],
        "positions not added": [("x = x + self.pos_embed", "")],
        "positions added before the class token": [
            ("x = self.patch_embed(x)", "x = self.patch_embed(x) + self.pos_embed[:, 1:]"),
            ("x = x + self.pos_embed", ""),
        ],
        "positions shifted by one": [
            ("x = self.patch_embed(x)", "x = self.patch_embed(x)\n"
             "        x = x + self.pos_embed[:, : x.shape[1]]"),
            ("x = x + self.pos_embed\n        return", "return"),
        ],
        "class token appended": [("torch.cat((cls, x), dim=1)", "torch.cat((x, cls), dim=1)")],
        "class token at the end": [
            ("torch.cat((cls, x), dim=1)", "torch.cat((x, cls), dim=1)"), ("x[:, 0]", "x[:, -1]"),
        ],
        "class token not expanded": [("self.cls_token.repeat(x.shape[0], 1, 1)", "self.cls_token")],
        "class token without parameter": [
            ("self.cls_token = nn.Parameter(torch.zeros(1, 1, D))", "self.width = D"),
            ("if self.cls_token is not None", "if self.config.class_token"),
            ("self.cls_token.repeat(x.shape[0], 1, 1)", "torch.zeros(x.shape[0], 1, self.width)"),
        ],
        "mean over all tokens": [("x = x[:, 0]", "x = x.mean(1)")],
        "mean over the patches": [("x = x[:, 0]", "x = x[:, 1:].mean(1)")],
        "head on the last token": [("x = x[:, 0]", "x = x[:, -1]")],
        "head on every token": [("x = x[:, 0]", "pass")],
        "softmax before the loss": [("x = self.head(x)", "x = self.head(x).softmax(1)")],
        "no final norm": [("x = self.norm(x)", "")],
        "norm before the blocks": [
            ("x = self.embed(x)", "x = self.norm(self.embed(x))"), ("x = self.norm(x)", ""),
        ],
        "wrong eps in the final norm": [
            ("self.norm = nn.LayerNorm(D, eps=1e-6)", "self.norm = nn.LayerNorm(D)"),
        ],
        "blocks share their weights": [
            ("blocks = []", "block = Block(config)\n        blocks = []"),
            ("blocks.append(Block(config, rate))", "blocks.append(block)"),
        ],
        "only the first block used": [
            ("x = block(x)\n        x = self.norm(x)\n        return x",
             "x = block(x)\n            return self.norm(x)"),
        ],
        "only the last block used": [
            ("x = block(x)\n        x = self.norm(x)", "y = block(x)\n        x = self.norm(y)"),
        ],
        "dropout before the head active in eval mode": [
            ("self.dropout(self.fc_norm(x))",
             "F.dropout(self.fc_norm(x), self.config.drop_rate)"),
        ],
        "class token detached": [
            ("self.cls_token.repeat", "self.cls_token.data.repeat"),
        ],
        "positions detached": [("x = x + self.pos_embed", "x = x + self.pos_embed.detach()")],
    },
}  # fmt: skip
# Mistakes that are recognized by a symptom: part, edits.
SYMPTOMS_MADE = {
    "/ instead of //": ("VisionTransformer", [
        ("n = (config.img_size // config.patch_size) ** 2",
         "n = (config.img_size / config.patch_size) ** 2")]),
    "wrong number of axes unpacked": ("Attention", [("B, N, D = x.shape", "N, D = x.shape")]),
    "tensor unpacked along the batch": ("Attention", [("self.qkv(x).split(D, dim=-1)",
                                                       "self.qkv(x)")]),
    "ModuleList called like a layer": ("VisionTransformer", [
        ("for block in self.blocks:\n            x = block(x)", "x = self.blocks(x)")]),
    "forward missing": ("MLP", [("def forward", "def foward")]),
    "super().__init__() missing": ("MLP", [("super().__init__()", "pass")]),
    "nothing returned": ("MLP", [("return h", "")]),
    "view of a transposed tensor": ("Attention", [
        ("out.transpose(1, 2).reshape(B, N, D)", "out.transpose(1, 2).view(B, N, D)")]),
    "loss called like a function": ("training_step", [("CrossEntropyLoss()", "CrossEntropyLoss")]),
    "comparison used as a condition": ("evaluate", [
        ("correct += (predicted == labels).sum().item()",
         "if predicted == labels:\n                correct += 1")]),
    "no_grad without parentheses": ("evaluate", [("no_grad()", "no_grad")]),
    "hard-coded device": ("VisionTransformer", [
        ("x = x + self.pos_embed",
         "x = x + self.pos_embed + torch.zeros(x.shape[1], 1)")]),
    "hard-coded dtype": ("Attention", [
        ("weights = torch.softmax(scores, dim=3)",
         "weights = torch.softmax(scores, dim=3, dtype=torch.float32)")]),
    "hard-coded batch size": ("PatchEmbed", [("B = x.shape[0]", "B = 2")]),
    "hard-coded size": ("VisionTransformer", [
        ("n = (config.img_size // config.patch_size) ** 2", "n = 196")]),
    "layers created in forward": ("MLP", [
        ("h = self.fc1(x)", "h = nn.Linear(x.shape[-1], self.fc2.in_features)(x)")]),
    "random in eval mode": ("Block", [
        ("m = self.mlp(self.norm2(x))", "m = F.dropout(self.mlp(self.norm2(x)), 0.3)")]),
    "parameters in a plain list": ("VisionTransformer", [
        ("self.blocks = nn.ModuleList(blocks)", "self.blocks = blocks")]),
    "tensor instead of parameter": ("VisionTransformer", [
        ("nn.Parameter(torch.zeros(1, n, D))", "torch.zeros(1, n, D)"),
        ]),
    "input changed in place": ("Block", [
        ("x = x + self.drop(self.ls1(a))", "x += self.drop(self.ls1(a))")]),
    "in-place operation on a value that backward needs": ("Attention", [
        ("dropped = F.dropout(weights, self.p, self.training)",
         "dropped = weights\n        weights *= 1.0")]),
    "detached graph": ("Attention", [("out = self.proj(out)", "out = self.proj(out).detach()")]),
}  # fmt: skip
# Mistakes that only the options of the configuration or training mode show: part, edits.
DROP = "dropped = F.dropout(weights, self.p, self.training)"
OPTIONS_MADE = {
    "qkv_bias ignored": ("Attention", [(", bias=config.qkv_bias", "")]),
    "weights not returned": ("Attention", [("return (out, weights) if return_weights else out",
                                            "return out")]),
    "return_weights changes the output": ("Attention", [
        ("return (out, weights)", "return (out + 1, weights)")]),
    "wrong weights returned": ("Attention", [("return (out, weights)", "return (out, scores)")]),
    "no attention dropout": ("Attention", [(DROP, "dropped = weights")]),
    "dropout on the output": ("Attention", [
        (DROP, "dropped = weights"),
        ("out = self.proj(out)", "out = F.dropout(self.proj(out), self.p, self.training)")]),
    "dropout before the softmax": ("Attention", [
        (DROP, "dropped = weights"),
        ("weights = torch", "scores = F.dropout(scores, self.p, self.training)\n"
         "        weights = torch")]),
    "dropout with other weights": ("Attention", [
        (DROP, "dropped = F.dropout(weights, self.p / 2, self.training)")]),
    "weights returned after dropout": ("Attention", [
        ("return (out, weights)", "return (out, dropped)")]),
    "LayerScale missing or misplaced": ("Block", [("self.drop(self.ls1(a))", "self.drop(a)")]),
    "no drop path": ("Block", [("DropPath(drop_path)", "DropPath(0.0)")]),
    "drop path without residual": ("Block", [("DropPath(drop_path)", "DropPath(1.0)")]),
    "fails with one block": ("VisionTransformer", [
        ("max(config.depth - 1, 1)", "(config.depth - 1)")]),
    "pre_logits ignored": ("VisionTransformer", [("if pre_logits:", "if False:")]),
    "wrong mean": ("VisionTransformer", [("x[:, self.num_prefix_tokens :].mean(1)", "x.mean(1)")]),
    "class token without class_token": ("VisionTransformer", [
        ("x[:, self.num_prefix_tokens :].mean(1)", "x[:, 1:].mean(1)")]),
    "no dropout before the head": ("VisionTransformer", [
        ("self.dropout(self.fc_norm(x))", "self.fc_norm(x)")]),
    "dropout without drop_rate": ("VisionTransformer", [
        ("nn.Dropout(config.drop_rate)", "nn.Dropout(0.1)")]),
    "dropout elsewhere": ("VisionTransformer", [
        ("self.dropout(self.fc_norm(x))", "self.fc_norm(x)"),
        ("x = self.head(x)", "x = self.dropout(self.head(x))")]),
    "wrong drop path rates": ("VisionTransformer", [("Block(config, rate)",
                                                     "Block(config, config.drop_path_rate)")]),
    "init_weights() not called": ("VisionTransformer", [("self.init_weights()", "")]),
}  # fmt: skip
STEPS_MADE = {
    "training_step": {
        "gradients not cleared": [("optimizer.zero_grad()", "")],
        "gradients cleared before the step": [
            ("optimizer.zero_grad()", ""),
            ("loss.backward()", "loss.backward()\n    optimizer.zero_grad()"),
        ],
        "step before backward": [
            ("optimizer.zero_grad()", ""), ("optimizer.step()", ""),
            ("loss.backward()", "optimizer.step()\n    optimizer.zero_grad()\n    loss.backward()"),
        ],
        "step before backward, gradients cleared first": [
            ("optimizer.step()", ""), ("loss.backward()", "optimizer.step()\n    loss.backward()"),
        ],
        "no train mode": [("model.train()", "")],
        "softmax before the loss": [("model(images)", "torch.softmax(model(images), dim=1)")],
        "sum instead of mean": [("CrossEntropyLoss()", "CrossEntropyLoss(reduction='sum')")],
        "squared error instead of cross-entropy": [
            ("nn.CrossEntropyLoss()(logits, labels)",
             "((logits - torch.eye(logits.shape[1])[labels]) ** 2).mean()"),
        ],
        "no step": [("optimizer.step()", "")],
        "loss returned with its graph": [("loss.item()", "loss")],
        "loss after the update": [
            ("loss.item()", "nn.CrossEntropyLoss()(model(images), labels).item()"),
        ],
    },
    "evaluate": {
        "no eval mode": [("model.eval()", "")],
        "gradients computed": [("with torch.no_grad():", "if True:")],
        "augmented validation images": [("eval_transform(images)", "train_transform(images)")],
        "images not transformed": [("images = eval_transform(images)", "")],
        "argmax without axis": [(".argmax(1)", ".argmax()")],
        "mean of the batches' accuracies": [
            ("(predicted == labels).sum().item()", "(predicted == labels).double().mean().item()"),
            ("total += len(labels)", "total += 1"),
        ],
        "accuracy of the last batch": [
            ("correct += (predicted", "correct = (predicted"),
            ("total += len(labels)", "total = len(labels)"),
        ],
        "percent instead of a fraction": [("correct / total", "100 * correct / total")],
        "correct predictions not divided": [("correct / total", "correct")],
        "divided by the number of batches": [("total += len(labels)", "total += 1")],
    },
    "replace_head": {
        "nothing frozen": [("for p in model.parameters():\n        p.requires_grad = False",
                            "model.requires_grad = False")],
        "new head frozen": [
            ("for p in model.parameters():\n        p.requires_grad = False", ""),
            ("num_classes)\n", "num_classes)\n    for p in model.parameters():\n"
             "        p.requires_grad = False\n"),
        ],
        "only the blocks frozen": [("model.parameters()", "model.blocks.parameters()")],
        "head not replaced": [
            ("model.head = nn.Linear(model.head.in_features, num_classes)",
             "model.head.weight.requires_grad = model.head.bias.requires_grad = True"),
        ],
        "new head behind the old one": [
            ("nn.Linear(model.head.in_features, num_classes)",
             "nn.Sequential(model.head, nn.Linear(model.head.out_features, num_classes))"),
        ],
        "backbone weights changed": [
            ("num_classes)\n", "num_classes)\n    model.init_weights()\n"),
        ],
    },
}  # fmt: skip
# Two mistakes at once: part, and the names of two entries above.
PAIRS = [
    ("PatchEmbed", "column-major patches", "padded convolution"),
    ("PatchEmbed", "reshape instead of transpose", "padded convolution"),
    ("PatchEmbed", "channels not moved to the last axis", "overlapping patches"),
    ("PatchEmbed", "channels not moved to the last axis", "stride of one"),
    ("PatchEmbed", "column-major patches", "overlapping patches"),
    ("MLP", "ReLU instead of GELU", "residual connection inside the MLP"),
    ("MLP", "tanh approximation of GELU", "residual connection inside the MLP"),
    ("MLP", "no activation function", "residual connection inside the MLP"),
    ("MLP", "ReLU instead of GELU", "hidden width always four times the embedding width"),
    ("MLP", "SiLU instead of GELU", "hidden width always four times the embedding width"),
    ("MLP", "ReLU instead of GELU", "missing second linear layer"),
    ("Attention", "softmax over queries", "missing 1/sqrt(d)"),
    ("Attention", "softmax over queries", "heads not merged back"),
    ("Attention", "missing 1/sqrt(d)", "heads not merged back"),
    ("Attention", "q and k swapped", "1/d instead of 1/sqrt(d)"),
    ("Attention", "q and k swapped", "softmax over heads"),
    ("Attention", "v replaced by k", "missing 1/sqrt(d)"),
    ("Attention", "causal mask", "1/sqrt(D) instead of 1/sqrt(d)"),
    ("Attention", "output projection not used", "softmax over queries"),
    ("Attention", "residual connection inside of attention", "missing 1/sqrt(d)"),
    ("Attention", "qkv layout (h, 3, d)", "sqrt(d) multiplied instead of divided"),
    ("Attention", "heads split without transpose", "missing 1/sqrt(d)"),
    ("Attention", "weights transposed", "1/d instead of 1/sqrt(d)"),
    ("Block", "missing residual around attention", "no norm before the MLP"),
    ("Block", "doubled residual around the MLP", "no norm before attention"),
    ("Block", "missing residual around the MLP", "wrong eps"),
    ("Block", "norm over tokens", "missing residual around attention"),
    ("Block", "no norm before attention", "no norm before the MLP"),
    ("Block", "norm1 used twice", "missing residual around the MLP"),
    ("VisionTransformer", "positions not added", "mean over all tokens"),
    ("VisionTransformer", "positions added twice", "no final norm"),
    ("VisionTransformer", "class token appended", "softmax before the loss"),
    ("VisionTransformer", "mean over the patches", "softmax before the loss"),
    ("VisionTransformer", "no final norm", "head on the last token"),
    ("VisionTransformer", "head on the last token", "positions not added"),
    ("VisionTransformer", "blocks share their weights", "positions added twice"),
]
# Several mistakes at once in a function: part, names of the entries above.
STEP_GROUPS = [
    ("training_step", "gradients not cleared", "no train mode"),
    ("training_step", "no train mode", "softmax before the loss", "loss returned with its graph"),
    ("training_step", "gradients not cleared", "sum instead of mean"),
    ("evaluate", "no eval mode", "gradients computed"),
    ("evaluate", "no eval mode", "gradients computed", "images not transformed"),
    ("evaluate", "gradients computed", "divided by the number of batches"),
    ("replace_head", "only the blocks frozen", "backbone weights changed"),
    ("replace_head", "nothing frozen", "new head behind the old one"),
]
