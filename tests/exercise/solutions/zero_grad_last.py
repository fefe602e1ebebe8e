"""The steps with zero_grad at the end, a decorator for no_grad, and a new head from a list."""

import torch
import torch.nn.functional as F
from torch import nn


def training_step(model, optimizer, images, labels):
    model.train()
    log_probabilities = F.log_softmax(model(images), dim=-1)
    loss = F.nll_loss(log_probabilities, labels)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


@torch.no_grad()
def evaluate(model, batches, train_transform, eval_transform):
    model.eval()
    hits = []
    for x, y in batches:
        scores = model(eval_transform(x)).softmax(dim=1)
        hits.extend((scores.argmax(dim=1) == y).tolist())
    return sum(hits) / len(hits)


def replace_head(model, num_classes):
    model.requires_grad_(False)
    new = nn.Linear(model.config.embed_dim, num_classes)
    nn.init.zeros_(new.weight)
    nn.init.zeros_(new.bias)
    model.head = new
