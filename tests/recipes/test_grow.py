import pytest
import torch

from recipes.grow import start_from
from recipes.student import Shape, Student

SMALL = Shape(layers=2, width=32, heads=2, feed_forward=48, positions=8, position_groups=4)


def test_a_larger_encoder_begins_by_saying_what_the_smaller_one_said():
    torch.manual_seed(0)
    earlier, larger = Student(SMALL).eval(), Student(SMALL.model_copy(update={"layers": 4})).eval()
    for student in (earlier, larger):
        torch.nn.init.normal_(student.speaker.layer_weights)
    start_from(larger, earlier)
    wave = 0.1 * torch.randn(1, 8000)
    with torch.no_grad():
        said, says = earlier(wave), larger(wave)
    torch.testing.assert_close(says.hidden, said.hidden)
    torch.testing.assert_close(says.characters, said.characters)
    torch.testing.assert_close(says.voice, said.voice, atol=0.05, rtol=0.05)
    larger(wave).hidden.square().sum().backward()
    gradient = larger.encoder.encoder.layers[3].attention.out_proj.weight.grad
    assert gradient is not None
    assert gradient.any()


def test_weights_of_more_layers_are_refused():
    larger = Student(SMALL.model_copy(update={"layers": 3}))
    with pytest.raises(ValueError, match="at most 2 layers to start from, got 3"):
        start_from(Student(SMALL), larger)
