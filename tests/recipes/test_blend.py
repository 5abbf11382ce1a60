import torch

from recipes.blend import blend
from recipes.student import Shape, Student


def test_a_blend_lies_between_and_keeps_the_later_voice_layer():
    torch.manual_seed(0)
    shape = Shape(layers=1, width=32, heads=2, feed_forward=32, positions=4, position_groups=4)
    later, earlier = Student(shape), Student(shape)
    after = {name: p.detach().clone() for name, p in later.named_parameters()}
    before = {name: p.detach().clone() for name, p in earlier.named_parameters()}
    blend(later, earlier, 0.25)
    for name, parameter in later.named_parameters():
        if name.startswith("speaker.feature_extractor."):
            assert torch.equal(parameter, after[name])
        else:
            assert torch.allclose(parameter, 0.25 * after[name] + 0.75 * before[name], atol=1e-6)
