import torch

from recipes.normalise import centre, error, fold, whitening, within
from recipes.student import Shape, Student


def voices(seed=0, speakers=12, each=8):
    """Speakers who differ in a few directions, moments that differ in other, louder ones."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.zeros(speakers, 192)
    means[:, :6] = torch.randn(speakers, 6, generator=generator)
    label = torch.arange(speakers).repeat_interleave(each)
    noise = 0.05 * torch.randn(len(label), 192, generator=generator)
    noise[:, 6:12] += 2 * torch.randn(len(label), 6, generator=generator)
    return means[label] + noise + 3.0, label


def test_what_differs_within_a_speaker_counts_less():
    x, label = voices()
    a = whitening(within(x, label), 0.1)
    assert error((x - centre(x, label)) @ a, label) < error(x, label) / 2
    other, whose = voices(seed=1)
    assert error((other - centre(x, label)) @ a, whose) < error(other, whose) / 2


def test_whitening_makes_a_sphere_and_a_sphere_changes_nothing():
    x, label = voices()
    covariance = within(x, label)
    a = whitening(covariance, 0.01)
    almost = a @ (0.99 * covariance + 0.01 * torch.eye(192) * covariance.trace() / 192) @ a.T
    assert torch.allclose(almost, torch.eye(192), atol=1e-3)
    whole = whitening(covariance, 1.0)
    assert torch.allclose(whole, whole[0, 0] * torch.eye(192), atol=1e-4)


def test_the_head_gives_it_by_itself():
    torch.manual_seed(0)
    shape = Shape(layers=1, width=32, heads=2, feed_forward=32, positions=4, position_groups=4)
    student = Student(shape).eval()
    voice, mass = torch.rand(3, 60, 512), torch.ones(3, 60)
    with torch.inference_mode():
        before = student.embed(voice, mass)
    mean, a = torch.randn(192), whitening(torch.diag(torch.rand(192) + 0.1), 0.2)
    fold(student, mean, a)
    with torch.inference_mode():
        after = student.embed(voice, mass)
    expected = (before - mean) @ a
    assert torch.allclose(
        torch.nn.functional.normalize(after), torch.nn.functional.normalize(expected), atol=1e-4
    )
