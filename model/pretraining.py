"""Pre-training: masked prediction, the utterance-wise contrastive loss, and utterance mixing.

The published `UniSpeechSatForPreTraining` has the parameters but no objective. Here `forward` adds
the paper's when it is given cluster targets, and behaves as published when it is not.

UniSpeech-SAT is arXiv 2110.05752, HuBERT arXiv 2106.07447, wav2vec 2.0 arXiv 2006.11477.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import UniSpeechSatConfig
from model.encoder import Output, PreTrainedModel, UniSpeechSatModel
from model.masking import compute_mask_indices


@dataclass
class UniSpeechSatForPreTrainingOutput(Output):
    """What pre-training gives. K clusters, P = ``proj_codevector_dim``.

    Without labels, as published: ``logits`` are the front end's features [B, T, C] and
    ``projected_states`` the last hidden state [B, T, D]; nothing else. With labels:

    loss:                        scalar, ``prediction + contrastive + α · diversity``
    logits:                      [B, T, K], cosine similarity to each cluster / temperature
    projected_states:            [B, T, P]
    projected_quantized_states:  [B, T, P], zero where no frame is masked
    codevector_perplexity:       scalar, entries of the codebook in use, at most groups · entries
    prediction_loss, contrastive_loss, diversity_loss: scalars
    mask_time_indices:           [B, T] bool, the frames that were masked and exist
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    projected_states: Tensor | None = None
    projected_quantized_states: Tensor | None = None
    codevector_perplexity: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    prediction_loss: Tensor | None = None
    contrastive_loss: Tensor | None = None
    diversity_loss: Tensor | None = None
    mask_time_indices: Tensor | None = None


class UniSpeechSatGumbelVectorQuantizer(nn.Module):
    """Product quantisation with a Gumbel-softmax choice in each group.

    Source: the published class of this name; wav2vec 2.0, section 2 "Quantization module",
    equation 1.
    """

    def __init__(self, config: UniSpeechSatConfig) -> None:
        super().__init__()
        self.num_groups = config.num_codevector_groups
        self.num_vars = config.num_codevectors_per_group
        if config.codevector_dim % self.num_groups:
            raise ValueError(
                f"codevector_dim: expected a multiple of num_codevector_groups "
                f"({self.num_groups}), got {config.codevector_dim}"
            )
        width = config.codevector_dim // self.num_groups
        self.codevectors = nn.Parameter(torch.rand(1, self.num_groups * self.num_vars, width))
        self.weight_proj = nn.Linear(config.hidden_size, self.num_groups * self.num_vars)
        self.temperature = 2.0
        """Of the Gumbel softmax; training anneals it (2 → 0.5 in the paper's recipe)."""
        self.weight_proj.weight.data = torch.randn_like(self.weight_proj.weight)
        nn.init.zeros_(self.weight_proj.bias)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Frames → code vectors and the perplexity of their use. [B, T, D] → [B, T, P'], scalar

        In training the choice is drawn and straight-through, the perplexity that of the mean soft
        choice; in evaluation both are those of the best entry. P' is ``codevector_dim``.
        """
        B, T, _ = hidden_states.shape
        G, V = self.num_groups, self.num_vars
        logits = self.weight_proj(hidden_states).view(B * T, G, V)
        if self.training:
            choice = F.gumbel_softmax(logits.float(), tau=self.temperature, hard=True)
            usage = logits.float().softmax(dim=-1)
        else:
            choice = F.one_hot(logits.argmax(dim=-1), V).float()
            usage = choice
        perplexity = codebook_perplexity(usage)
        entries = self.codevectors.view(G, V, -1)
        codes = torch.einsum("ngv,gvw->ngw", choice.to(entries.dtype), entries)
        return codes.reshape(B, T, -1), perplexity


class UniSpeechSatForPreTraining(PreTrainedModel):
    """The encoder with the heads that it was pre-trained with.

    Two config keys beyond the published ones steer the objective: ``utterance_contrastive_layer``
    (whose output the contrastive loss reads, counted from 1; default: the middle layer, the
    sixth of Base as in the authors' code) and ``content_loss_weight`` (β, default 1).
    """

    def __init__(self, config: UniSpeechSatConfig) -> None:
        super().__init__(config)
        self.unispeech_sat = UniSpeechSatModel(config)
        self.dropout_features = nn.Dropout(config.feat_quantizer_dropout)
        self.quantizer = UniSpeechSatGumbelVectorQuantizer(config)
        self.project_q = nn.Linear(config.codevector_dim, config.proj_codevector_dim)
        self.project_hid = nn.Linear(config.hidden_size, config.proj_codevector_dim)
        self.dropout = nn.Dropout(config.final_dropout)
        self.speaker_proj = nn.Linear(config.hidden_size, config.codevector_dim)
        # The authors' initialisation. The published one is zero, whose cosine has no gradient
        # to learn from.
        self.label_embeddings_concat = nn.Parameter(
            torch.rand(config.num_clusters, config.codevector_dim)
        )
        self.layer_norm_for_extract = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        for linear in (self.project_q, self.project_hid, self.speaker_proj):
            self._init_linear(linear)

    def set_gumbel_temperature(self, temperature: float) -> None:
        """Set the temperature of the quantiser's draw; only training reads it."""
        self.quantizer.temperature = temperature

    @staticmethod
    def compute_contrastive_logits(
        target_features: Tensor,
        negative_features: Tensor,
        predicted_features: Tensor,
        temperature: float = 1,
    ) -> Tensor:
        """Cosine similarity of predictions to the target and to the negatives, over temperature.

        target_features: [1, B, T, P], negative_features: [N, B, T, P],
        predicted_features: [1, B, T, P] → [1 + N, B, T]
        """
        candidates = torch.cat([target_features, negative_features], dim=0)
        similarity = torch.cosine_similarity(predicted_features.float(), candidates.float(), dim=-1)
        return similarity.type_as(candidates) / temperature

    def forward(
        self,
        input_values: Tensor,
        attention_mask: Tensor | None = None,
        mask_time_indices: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        labels: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Any:
        """As `UniSpeechSatModel.forward`; with ``labels`` the paper's objective as well.

        ``L = β · L_Content + L_Contrast + α · L_d`` (UniSpeech-SAT, section 3.1), over masked
        frames: see `prediction_loss`, `utterance_contrastive_loss`, `diversity_loss`. α is
        ``diversity_loss_weight``.

        Args:
            input_values: [B, N], usually from `mix_utterances`.
            attention_mask: [B, N], 1 for a sample, 0 for right padding.
            mask_time_indices: [B, T] bool, frames to mask; with labels and without this, they
                are drawn by ``mask_time_prob`` and its kin (HuBERT pre-trains with 0.8).
            output_attentions: Also return the attention matrices.
            output_hidden_states: Also return every layer's output.
            return_dict: False for a plain tuple.
            labels: [B, T] cluster of every frame; negative ones are left out.
            generator: Of the drawn masks and negatives (CPU).

        Returns:
            `UniSpeechSatForPreTrainingOutput`.

        Raises:
            ValueError: labels of another shape or past ``num_clusters``, a config that cannot mask
                (``apply_spec_augment`` off), or whose projections do not meet.
        """
        config = self.config
        if labels is not None:
            mask_time_indices = self._masked(
                labels, input_values, attention_mask, mask_time_indices, generator
            )
        wanted = config.output_hidden_states
        wanted = wanted if output_hidden_states is None else output_hidden_states
        outputs = self.unispeech_sat(
            input_values,
            attention_mask=attention_mask,
            mask_time_indices=mask_time_indices,
            output_attentions=output_attentions,
            output_hidden_states=wanted or labels is not None,
            return_dict=True,
        )
        if labels is None:
            output = UniSpeechSatForPreTrainingOutput(
                logits=self.dropout_features(outputs.extract_features),
                projected_states=outputs.last_hidden_state,
            )
        else:
            assert mask_time_indices is not None
            output = self._objective(outputs, mask_time_indices, labels, generator)
        output.hidden_states = outputs.hidden_states if wanted else None
        output.attentions = outputs.attentions
        wants_dict = config.return_dict if return_dict is None else return_dict
        return output if wants_dict else output.to_tuple()

    def _masked(
        self,
        labels: Tensor,
        input_values: Tensor,
        attention_mask: Tensor | None,
        mask: Tensor | None,
        generator: torch.Generator | None,
    ) -> Tensor:
        """The frames to mask [B, T], those that exist; the labels are checked on the way."""
        config = self.config
        B, N = input_values.shape
        T = config.frames(N)
        if not config.apply_spec_augment:
            raise ValueError("apply_spec_augment: expected true, masked prediction needs masks")
        if config.codevector_dim != config.proj_codevector_dim:
            raise ValueError(
                "expected codevector_dim and proj_codevector_dim to be equal, got "
                f"{config.codevector_dim} and {config.proj_codevector_dim}"
            )
        if tuple(labels.shape) != (B, T):
            raise ValueError(f"labels: expected [{B}, {T}], got {list(labels.shape)}")
        if int(labels.max()) >= config.num_clusters:
            raise ValueError(
                f"labels: expected clusters below {config.num_clusters}, got {int(labels.max())}"
            )
        exists = None
        if attention_mask is not None:
            exists = self.feature_attention_mask(T, attention_mask)
        if mask is None:
            mask = compute_mask_indices(
                (B, T),
                config.mask_time_prob,
                config.mask_time_length,
                attention_mask=exists,
                min_masks=config.mask_time_min_masks,
                generator=generator,
            )
        mask = mask.to(input_values.device, torch.bool)
        return mask if exists is None else mask & exists

    def _objective(
        self, outputs: Any, mask: Tensor, labels: Tensor, generator: torch.Generator | None
    ) -> UniSpeechSatForPreTrainingOutput:
        config = self.config
        temperature = config.contrastive_logits_temperature
        projected = self.project_hid(self.dropout(outputs.last_hidden_state))
        logits = cosine_logits(projected, self.label_embeddings_concat, temperature)
        prediction = prediction_loss(logits, labels, mask)

        layer = config.extra.get("utterance_contrastive_layer", config.num_hidden_layers // 2)
        if not 1 <= layer <= config.num_hidden_layers:
            raise ValueError(
                f"utterance_contrastive_layer: expected 1 to {config.num_hidden_layers}, "
                f"got {layer}"
            )
        speaker = outputs.hidden_states[layer][mask]  # [M, D]
        if config.do_stable_layer_norm:
            speaker = self.layer_norm_for_extract(speaker)
        if len(speaker):
            codes, perplexity = self.quantizer(speaker.unsqueeze(0))
        else:  # utterances too short for one span: nothing to learn from, and nothing undefined
            codes, perplexity = speaker.new_zeros(1, 0, config.codevector_dim), speaker.sum()
        targets = self.project_q(codes.squeeze(0))
        utterance = mask.nonzero()[:, 0]
        contrastive = utterance_contrastive_loss(
            self.speaker_proj(speaker),
            targets,
            utterance,
            temperature,
            num_negatives=config.num_negatives,
            generator=generator,
        )
        diversity = diversity_loss(
            perplexity, config.num_codevector_groups * config.num_codevectors_per_group
        )
        quantized = targets.new_zeros(*mask.shape, targets.shape[-1])
        quantized[mask] = targets
        weight = config.extra.get("content_loss_weight", 1.0)
        return UniSpeechSatForPreTrainingOutput(
            loss=weight * prediction + contrastive + config.diversity_loss_weight * diversity,
            logits=logits,
            projected_states=projected,
            projected_quantized_states=quantized,
            codevector_perplexity=perplexity,
            prediction_loss=prediction,
            contrastive_loss=contrastive,
            diversity_loss=diversity,
            mask_time_indices=mask,
        )


def cosine_logits(x: Tensor, candidates: Tensor, temperature: float) -> Tensor:
    """``sim(x, c) / τ``, in float32. x: [..., P], candidates: [K, P] → [..., K]"""
    x, candidates = F.normalize(x.float(), dim=-1), F.normalize(candidates.float(), dim=-1)
    return x @ candidates.T / temperature


def prediction_loss(logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """Masked prediction of cluster targets, L_Content.

    ``−1/|M| Σ_{t∈M} log p(z_t | X̃, t)`` with ``p`` the softmax of ``sim(A o_t, e_c) / τ``.

    Source: HuBERT, section II-B, equations 1 and 3 (only masked frames count, α = 1);
    UniSpeech-SAT, section 2.

    Args:
        logits: [B, T, K].
        labels: [B, T]; negative ones are left out.
        mask: [B, T] bool, M.

    Returns:
        The mean over frames, 0 where none counts.
    """
    counted = mask & (labels >= 0)
    loss = F.cross_entropy(logits[counted].float(), labels[counted], reduction="sum")
    return loss / counted.sum().clamp(min=1)


def utterance_contrastive_loss(
    states: Tensor,
    targets: Tensor,
    utterance: Tensor,
    temperature: float,
    num_negatives: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Frames of one utterance are each other's positives, L_Contrast.

    For a latent frame ``l`` of utterance ``b`` and a quantised frame ``q`` of the same one::

        −log( exp(sim(l, q)/κ) / (exp(sim(l, q)/κ) + Σ_{q′ ∉ Q_b} exp(sim(l, q′)/κ)) )

    averaged over the ``q`` of the utterance, then over ``l``. One speaker an utterance makes it a
    speaker loss that needs no labels. (The authors' released training code scores the same pairs
    by a binary cross-entropy instead; this is the equation of the paper.)

    Source: UniSpeech-SAT, section 3.1, L_Contrast.

    Args:
        states: [M, P], masked frames of an intermediate layer, projected.
        targets: [M, P], the same frames quantised and projected.
        utterance: [M], the utterance of each.
        temperature: κ.
        num_negatives: Draw this many negatives a frame; ``None`` takes all.
        generator: Of the draw (CPU).

    Returns:
        Scalar, 0 where there is only one utterance.
    """
    similarity = cosine_logits(states, targets, temperature)  # [M, M]
    same = utterance.unsqueeze(1) == utterance
    if bool(same.all()):
        return similarity.sum() * 0
    negative = ~same
    if num_negatives is not None and num_negatives < len(utterance):
        score = torch.rand(same.shape, generator=generator).to(same.device)
        rank = score.masked_fill(same, 2).argsort(dim=1).argsort(dim=1)
        negative = negative & (rank < num_negatives)
    against = similarity.masked_fill(~negative, -torch.inf).logsumexp(dim=1, keepdim=True)
    loss = F.softplus(against - similarity)
    return ((loss * same).sum(dim=1) / same.sum(dim=1)).mean()


def codebook_perplexity(probabilities: Tensor) -> Tensor:
    """``Σ_g exp(H(p̄_g))``: entries in use. probabilities: [N, G, V] → scalar, 1·G to V·G

    Source: wav2vec 2.0, section 2 (p̄ is the mean over the batch).
    """
    mean = probabilities.mean(dim=0)
    # p log p is flat at 0, its derivative is not: an entry nobody uses must not make it infinite
    return torch.exp(-(mean * mean.clamp(min=1e-7).log()).sum(dim=-1)).sum()


def diversity_loss(perplexity: Tensor, entries: int) -> Tensor:
    """All entries of the codebook shall be used, L_d: ``(GV − Σ_g exp(H(p̄_g))) / GV``.

    Source: wav2vec 2.0, section 3.2 "Diversity loss", equation 4, as its code computes it;
    UniSpeech-SAT, section 3.1. 0 where use is even.
    """
    return (entries - perplexity) / entries


# ---------------------------------------------------------------------------------------------
# Utterance mixing


def mix_utterances(
    input_values: Tensor,
    lengths: Tensor | None = None,
    prob: float = 0.2,
    ratio_db: tuple[float, float] = (-5.0, 5.0),
    normalize: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Lay a piece of another utterance of the batch over some utterances.

    Each utterance is with ``prob`` a primary: a chunk of at most half its length, from a random
    place of another utterance, is added at a random place of it, at a random energy ratio.
    The targets stay those of the primary, which speaks most of the time. Chunks come from the
    utterances as they were, so no mixture holds more than two.

    Source: UniSpeech-SAT, section 3.2 (20 % of the utterances); the energy ratio as the authors'
    code has it.

    Args:
        input_values: [B, N].
        lengths: [B] real samples of each, the rest being right padding; ``None``: all of them.
        prob: Share of utterances to mix, 0 to 1.
        ratio_db: Range of the energy of the primary over that of the other, decibels.
        normalize: Bring mixed utterances back to zero mean and unit variance, for
            checkpoints with ``do_normalize``.
        generator: Source of randomness (CPU).

    Returns:
        [B, N], a new tensor.

    Raises:
        ValueError: not a batch, or ``prob`` outside 0 to 1.
    """
    if input_values.dim() != 2:
        raise ValueError(f"input_values: expected [B, N], got {list(input_values.shape)}")
    if not 0 <= prob <= 1:
        raise ValueError(f"prob: expected 0 to 1, got {prob}")
    B, N = input_values.shape

    def draw(low: int, high: int) -> int:
        """A whole number from low to high, both included."""
        return int(torch.randint(low, high + 1, (), generator=generator))

    size = [N] * B if lengths is None else [int(n) for n in lengths]
    low, high = ratio_db
    mixed = input_values.clone()
    for i in range(B):
        if B < 2 or float(torch.rand((), generator=generator)) >= prob:
            continue
        other = draw(0, B - 2)
        other += other >= i
        length = draw(1, max(1, min(size[i] // 2, size[other])))
        ratio = low + (high - low) * float(torch.rand((), generator=generator))
        mixed[i, : size[i]] = overlaid(
            input_values[i, : size[i]],
            input_values[other, : size[other]],
            at=draw(0, size[i] - length),
            start=draw(0, size[other] - length),
            length=length,
            ratio_db=ratio,
        )
        if normalize:
            mixed[i, : size[i]] = F.layer_norm(mixed[i, : size[i]], (size[i],))
    return mixed


def overlaid(
    primary: Tensor, other: Tensor, *, at: int, start: int, length: int, ratio_db: float
) -> Tensor:
    """Add ``other[start : start + length]`` to the primary from sample ``at`` on.

    It is scaled so that the primary's mean energy is ``ratio_db`` above the other's, both over
    the whole utterance. A silent other adds nothing. primary: [N], other: [N'] → [N]
    """
    energy = other.square().mean()
    scale = (primary.square().mean() / (energy * 10 ** (ratio_db / 10))).sqrt()
    scale = torch.where(energy > 0, scale, torch.zeros_like(scale))
    mixed = primary.clone()
    mixed[at : at + length] += scale * other[start : start + length]
    return mixed
