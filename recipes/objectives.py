"""The losses of the joint run."""

from collections.abc import Sequence
from itertools import permutations

import torch
import torch.nn.functional as F
from torch import Tensor

from recipes.student import VOCABULARY


def pit_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Permutation-invariant binary cross-entropy (Fujita et al. 2019).  [B, T, S] twice → [].

    Each row takes the assignment of outputs to speakers with the least loss.
    """
    B, T, S = logits.shape
    pair = F.binary_cross_entropy_with_logits(
        logits[..., :, None].expand(B, T, S, S),
        target[..., None, :].expand(B, T, S, S).to(logits.dtype),
        reduction="none",
    ).mean(1)
    orders = torch.tensor(list(permutations(range(S))), device=logits.device)
    losses = pair[:, torch.arange(S, device=logits.device), orders].mean(-1)
    return losses.min(1).values.mean()


def hint_loss(logits: Tensor, target: Tensor, order: Tensor) -> Tensor:
    """Binary cross-entropy of one given assignment.  [B, T, S] twice, order: [B, S] → [].

    ``order[b, s]`` is the speaker whom output s should follow.
    """
    B, T, S = logits.shape
    assigned = target.gather(2, order[:, None].expand(B, T, S))
    return F.binary_cross_entropy_with_logits(logits, assigned.to(logits.dtype))


def presence_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of "somebody speaks", which no permutation touches.  [B, T, S] twice → [].

    The probability that nobody speaks is the product of the complements, of outputs and targets.
    """
    nobody = F.logsigmoid(-logits).sum(-1).clamp(min=-30, max=-1e-4)
    somebody = torch.log1p(-nobody.exp())
    silent = (1 - target.to(logits.dtype)).prod(-1)
    return -(silent * nobody + (1 - silent) * somebody).mean()


def softened(exact: Tensor, taught: Tensor, share: float) -> Tensor:
    """Exact activity, and ``share`` of a teacher's view of it.  [B, T, S] twice → [B, T, S].

    The teacher's speakers are taken in the order that differs least from the exact ones.
    """
    pair = (exact[..., :, None] - taught[..., None, :]).square().mean(1)  # [B, exact, taught]
    speakers = torch.arange(exact.shape[-1], device=exact.device)
    orders = torch.tensor(list(permutations(speakers.tolist())), device=exact.device)
    best = orders[pair[:, speakers, orders].mean(-1).argmin(1)]
    return exact.lerp(taught.gather(2, best[:, None].expand_as(taught)), share)


class VoiceTargets:
    """The teacher's channels in units of their own deviation, and its centred embeddings.

    Attributes:
        scale: [512] deviation of each channel, with a floor: a few channels are almost always
            zero, and would dominate the loss if they were lifted.
        mean: [512] of the channels, in that unit.
        centre: [192] mean embedding, one vote a speaker.
        bank: [S, 192] unit centroids of the known speakers.
        names: speaker → row of the bank.
        axis: [192] along which the speakers differ most (about the sex of the voice).

    Centre and axis are those of the voices as they were recorded: a run that goes on with others
    beside them must find both where they were, the outputs' order above all.
    """

    def __init__(
        self,
        rows: Tensor,
        embeddings: Tensor,
        speakers: list[str],
        *,
        recorded: Sequence[bool] | None = None,
        floor: float = 0.25,
    ) -> None:
        """rows: [R, 512], a sample of frames; embeddings: [U, 192], with a name or "" each.

        recorded: of each embedding, whether the voice is; None is yes.
        """
        rows = rows.float()
        deviation = rows.std(0)
        self.scale = deviation.clamp(min=float(floor * deviation.median()))
        self.mean = rows.mean(0) / self.scale
        known = sorted({name for name in speakers if name})
        self.names = {name: row for row, name in enumerate(known)}
        row = torch.tensor([self.names.get(name, -1) for name in speakers])
        means = torch.stack([embeddings[row == r].mean(0) for r in range(len(known))])
        real = torch.ones(len(known), dtype=torch.bool)
        if recorded is not None:
            real[row[(row >= 0) & ~torch.tensor(recorded)]] = False
        self.centre = means[real].mean(0)
        self.bank = F.normalize(means - self.centre, dim=1)
        self.embeddings = F.normalize(embeddings - self.centre, dim=1)
        _, axes = torch.linalg.eigh(self.bank[real].T @ self.bank[real])
        self.axis = axes[:, -1] * axes[:, -1].sum().sign()  # eigh leaves the sign open

    def to(self, device: torch.device) -> None:
        """Moves everything to another device."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value.to(device))

    def order(self, utterances: Tensor) -> Tensor:
        """Which output each speaker of a scene is nudged to.  [B, 3], −1 for none → [B, 3].

        Permutation-invariant training starts on a plateau where one output carries all speech.
        Along the main axis of the voices the answer needs no comparison within the scene: output
        0 takes the lowest speaker, 1 the highest, 2 one in between; a single speaker goes by sign.
        """
        place = torch.where(utterances >= 0, self.embeddings[utterances] @ self.axis, torch.inf)
        place, low_to_high = place.sort(1)
        a, b, c = low_to_high.unbind(1)
        known = (utterances >= 0).sum(1)
        swap = (known == 1) & (place[:, 0] > 0)
        three = known == 3
        return torch.stack(
            [
                torch.where(swap, b, a),
                torch.where(swap, a, torch.where(three, c, b)),
                torch.where(three, b, c),
            ],
            1,
        )

    def dense_loss(self, voice: Tensor, target: Tensor, where: Tensor) -> Tensor:
        """Mean squared error a channel.  [B, T, 512] twice, where: [B, T] bool → []."""
        error = ((voice.float() - target / self.scale) ** 2).mean(-1)
        return (error * where).sum() / where.sum().clamp(min=1)

    def embedding_losses(
        self, embedding: Tensor, utterance: Tensor, row: Tensor, temperature: float = 0.07
    ) -> tuple[Tensor, Tensor]:
        """Cosine distance to the teacher, and NCE against every known speaker.  [P, 192] → [], [].

        utterance: [P] which teacher embedding each should be; row: [P] its speaker's row of the
        bank, or −1: speakers without a name have no part in the NCE, not even as negatives.
        """
        embedding = F.normalize(embedding.float(), dim=1)
        cosine = 1 - (embedding * self.embeddings[utterance]).sum(1).mean()
        if not bool((row >= 0).any()):
            return cosine, embedding.new_zeros(())
        logits = embedding[row >= 0] @ self.bank.T / temperature
        return cosine, F.cross_entropy(logits, row[row >= 0])


def ctc_loss(logits: Tensor, texts: list[str], lengths: Tensor | None = None) -> Tensor:
    """Connectionist temporal classification, per character.  logits: [B, T, V] → [].

    A row with an empty text has no transcript and is left out; lengths: [B] frames, or all.
    """
    kept = [i for i, text in enumerate(texts) if text]
    if not kept:
        return logits.new_zeros((), dtype=torch.float32)
    labels = [encode(texts[i]) for i in kept]
    log_probs = logits[kept].float().log_softmax(-1).transpose(0, 1)
    frames = torch.full((len(kept),), logits.shape[1]) if lengths is None else lengths[kept]
    return F.ctc_loss(
        log_probs,
        torch.cat(labels).to(logits.device),
        frames,
        torch.tensor([len(label) for label in labels]),
        zero_infinity=True,
    )


def reading_loss(logits: Tensor, posteriors: Tensor) -> Tensor:
    """Cross-entropy to the reader's posteriors, less their entropy.  [N, V] twice → [].

    Frames where the reader says a character weigh as much as those where it says blank: there are
    four times as many of the latter.
    """
    loss = F.kl_div(logits.float().log_softmax(-1), posteriors, reduction="none").sum(-1)
    spoken = 1 - posteriors[:, 0]
    weight = spoken / spoken.mean().clamp(min=0.05) + 1
    return (loss * weight).sum() / weight.sum()


def encode(text: str) -> Tensor:
    """Upper-case text → indices of characters, "|" between words; others are dropped."""
    index = {symbol: i for i, symbol in enumerate(VOCABULARY)}
    spelled = "|".join(text.upper().split())
    return torch.tensor([index[symbol] for symbol in spelled if symbol in index])


def edit_distance(a: Sequence[int], b: Sequence[int]) -> int:
    """Insertions, deletions and substitutions from ``a`` to ``b`` (Levenshtein)."""
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, start=1):
        previous, row[0] = row[0], i
        for j, right in enumerate(b, start=1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (left != right))
    return row[-1]
