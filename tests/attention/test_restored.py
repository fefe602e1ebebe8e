"""Extraction leaves the model unchanged, also after errors, and frees memory block by block."""

from functools import partial

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from lab.attention.extraction import attention_maps
from lab.attention.saliency import grad_cam, gradient_rollout, rollout
from tests.attention.zoo import METHODS, MODELS, assert_unchanged, close, images_for, mixed


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_methods_leave_model_and_images_unchanged(kind, method):
    model = mixed(MODELS[kind]())
    images = images_for(model)
    copy = images.clone()
    assert_unchanged(model, lambda: method(model, images))
    assert torch.equal(images, copy)
    assert not images.requires_grad
    assert images.grad is None


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_model_is_restored_after_an_error_in_its_forward_pass(kind, method, monkeypatch):
    model = mixed(MODELS[kind]())
    small = images_for(model)[..., :-4]
    assert_unchanged(model, lambda: method(model, small), (ValueError, AssertionError))

    def interrupted(*_):
        raise KeyboardInterrupt

    last = [module for module in model.modules() if type(module).__name__ in ("MLP", "Mlp")][-1]
    monkeypatch.setattr(last, "forward", interrupted)
    assert_unchanged(model, lambda: method(model, images_for(model)), KeyboardInterrupt)


@pytest.mark.parametrize("kind", MODELS)
def test_model_is_restored_after_an_error_in_reduce_or_backward(kind, monkeypatch):
    model, calls = mixed(MODELS[kind]()), []
    images = images_for(model)

    def reduce(error, block):
        calls.append(block)
        if len(calls) % 2 == 0:
            raise error

    for error in (ZeroDivisionError, KeyboardInterrupt):
        action = partial(attention_maps, model, images, partial(reduce, error))
        assert_unchanged(model, action, error)
    assert len(calls) == 4  # nothing runs after the error in the second block

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.autograd, "grad", interrupted)
    for method in (gradient_rollout, grad_cam):
        assert_unchanged(model, partial(method, model, images), KeyboardInterrupt)


@pytest.mark.parametrize("kind", MODELS)
def test_training_mode_and_no_grad_do_not_change_the_maps(kind):
    model = MODELS[kind]()
    images = images_for(model)
    with torch.no_grad():
        logits = model(images)
        expected = [method(model, images) for method in (rollout, gradient_rollout, grad_cam)]
    model.train()
    with torch.no_grad():
        assert (model(images) - logits).abs().max() > 1e-2
    close(attention_maps(model, images)[0], logits, atol=1e-5)
    maps = [method(model, images) for method in (rollout, gradient_rollout, grad_cam)]
    assert all(map(torch.equal, maps, expected))
    assert not any(m.requires_grad for m in maps)


@pytest.mark.parametrize("kind", MODELS)
def test_weights_of_a_block_are_freed_before_the_next_block(kind):
    model, references, alive = MODELS[kind](), [], []

    def reduce(block):
        references.append(StorageWeakRef(block.weights.untyped_storage()))
        alive.append(sum(not reference.expired() for reference in references))
        return block.weights.sum().item()

    _, sums = attention_maps(model, images_for(model), reduce)
    assert alive == [1] * len(sums)
    assert len(sums) > 2
    assert all(reference.expired() for reference in references)
