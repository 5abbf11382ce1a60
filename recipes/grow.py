"""A run that starts from the weights of a smaller encoder: further layers begin as the identity.

A layer adds what it computes to what it is given; with nothing in the last matrices of both its
parts it adds nothing. So the larger encoder says what the smaller one said, and learns from there.
"""

import torch

from recipes.student import Student

_UNHEARD = -6.0
"""Weight of a new layer's input in a head's sum of layers, before the softmax."""


@torch.no_grad()
def start_from(student: Student, earlier: Student) -> None:
    """Gives ``student`` the weights of ``earlier``, which may have fewer layers.

    Raises:
        ValueError: it has more.
        RuntimeError: they differ in another size.
    """
    own, theirs = (each.encoder.config.num_hidden_layers for each in (student, earlier))
    if theirs > own:
        raise ValueError(f"expected weights of at most {own} layers to start from, got {theirs}")
    weights = dict(earlier.named_parameters())
    for name, parameter in student.named_parameters():
        if name.endswith("layer_weights"):
            inputs, output = weights[name].split([theirs, 1])
            parameter.copy_(torch.cat([inputs, inputs.new_full((own - theirs,), _UNHEARD), output]))
        elif name in weights:
            parameter.copy_(weights[name])
        elif "attention.out_proj." in name or "feed_forward.output_dense." in name:
            parameter.zero_()
