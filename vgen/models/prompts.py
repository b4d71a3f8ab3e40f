"""Prompt embeddings, with any text encoder of transformers."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
import transformers
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from diffusers.utils import logging, scale_lora_layers, unscale_lora_layers
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForTextEncoding,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from vgen.hub import locate
from vgen.models.loading import load_strictly
from vgen.models.locks import lock_of

logger = logging.get_logger(__name__)

CAPTIONS_PER_BATCH = 64
"""Captions of training clips that are embedded at once."""


def load_text_encoder(source: str) -> Any:
    """Loads the text encoder of a pipeline in float32.

    Args:
        source: A folder or Hub id with a subfolder `text_encoder`, or a packaged checkpoint.

    Raises:
        ValueError: There is no such folder, the weights are pickled, do not match the config, or are NaN or infinite.
    """
    load = AutoModelForTextEncoding.from_pretrained
    return load_strictly(load, "the text encoder", locate(source), subfolder="text_encoder", dtype=torch.float32)


def load_tokenizer(source: str) -> Any:
    """Loads the tokenizer of a pipeline.

    Args:
        source: A folder or Hub id with a subfolder `tokenizer`, or a packaged checkpoint.

    Raises:
        ValueError: There is no such folder.
    """
    return AutoTokenizer.from_pretrained(locate(source), subfolder="tokenizer")


def check_text_encoder(folder: Path, class_name: str, variant: str | None) -> None:
    """Compares the keys of a saved text encoder with its config, without reading weights. Tied weights may be missing.

    transformers would initialize missing weights at random.

    Args:
        folder: Folder of the text encoder.
        class_name: Its class in transformers.
        variant: Name of the variant to load.

    Raises:
        ValueError: Keys are missing or unexpected. The error names them. Or transformers has no such class.
    """
    network_class = getattr(transformers, class_name, None)
    if network_class is None:
        raise ValueError(f"{folder} must contain a text encoder of transformers, got a {class_name}")
    if "quantization_config" in AutoConfig.from_pretrained(folder).to_dict():
        return  # the names of packed weights depend on their format
    log = transformers.utils.logging
    verbosity, shows_progress = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        load_strictly(network_class.from_pretrained, class_name, folder, device_map="meta", variant=variant)
    finally:
        log.set_verbosity(verbosity)
        if shows_progress:
            log.enable_progress_bar()


def tokenize(tokenizer: Any, prompts: Sequence[str], max_length: int) -> tuple[Tensor, Tensor]:
    """Cleans and tokenizes prompts as WanPipeline does.

    Args:
        tokenizer: A tokenizer of transformers.
        prompts: `b` prompts. Longer ones are truncated.
        max_length: Number of tokens that prompts are padded to.

    Returns:
        Token ids and attention mask, integers `(b, max_length)`.
    """
    with _settings_kept(tokenizer):
        batch = tokenizer(
            [prompt_clean(prompt) for prompt in prompts],
            padding="max_length",
            max_length=max_length,
            truncation=True,
            add_special_tokens=True,
            return_attention_mask=True,
            return_tensors="pt",
        )
    return batch.input_ids, batch.attention_mask


@contextmanager
def _settings_kept(tokenizer: Any) -> Iterator[None]:
    """Restores the truncation and padding that a call changes, and that would be saved with the tokenizer."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    truncation, padding = (None, None) if backend is None else (backend.truncation, backend.padding)
    try:
        yield
    finally:
        if backend is not None:
            backend.enable_truncation(**truncation) if truncation else backend.no_truncation()
            backend.enable_padding(**padding) if padding else backend.no_padding()


def embed(text_encoder: Any, input_ids: Tensor, mask: Tensor) -> Tensor:
    """Computes prompt embeddings from tokens.

    Embeddings after the end of a prompt are zero, as in WanPipeline. CLIP's are kept, as in StableDiffusionPipeline.

    Args:
        text_encoder: A text encoder of transformers.
        input_ids: Token ids `(b, l)`.
        mask: Attention mask `(b, l)`.

    Returns:
        Embeddings `(b, l, d)`.
    """
    if text_encoder.config.model_type == "clip_text_model":
        return text_encoder(input_ids).last_hidden_state
    embeddings = text_encoder(input_ids, mask).last_hidden_state
    return embeddings * mask[..., None].to(embeddings)


def encode_texts(
    text_encoder: Any,
    tokenizer: Any,
    texts: Sequence[str],
    max_length: int,
    device: torch.device,
    lora_scale: float | None = None,
) -> Tensor:
    """Computes the embeddings of texts, and warns of those that are truncated.

    Args:
        text_encoder: A text encoder of transformers.
        tokenizer: The text encoder's tokenizer.
        texts: `b` texts.
        max_length: Tokens per text, `l`.
        device: Device of the text encoder.
        lora_scale: Weight of the text encoder's LoRA layers during this call; `None` does not change it.

    Returns:
        Embeddings `(b, l, d)`.
    """
    scaled = lora_scale is not None and getattr(text_encoder, "_hf_peft_config_loaded", False)
    with lock_of(text_encoder):  # also the tokenizer's, whose settings a call changes
        warn_truncated(tokenizer, list(dict.fromkeys(texts)), max_length)
        ids, mask = tokenize(tokenizer, texts, max_length)
        if scaled:
            scale_lora_layers(text_encoder, lora_scale)
        try:
            return embed(text_encoder, ids.to(device), mask.to(device))
        finally:
            if scaled:
                unscale_lora_layers(text_encoder, lora_scale)


def warn_truncated(tokenizer: Any, texts: Sequence[str], max_length: int) -> None:
    """Logs a warning for each text that is longer than `max_length` tokens, with the part that is cut."""
    for text, length in zip(texts, _num_tokens(tokenizer, texts), strict=True):
        if length > max_length:
            rest = _cut_end(tokenizer, text, max_length)
            logger.warning(
                f"a prompt has {length} tokens, more than max_sequence_length={max_length}: the end is cut: {rest!r}"
            )


class CutCaptions:
    """Counts captions that are longer than a prompt may be, and warns of them in one line.

    Args:
        tokenizer: A tokenizer of transformers.
        max_length: Number of tokens that captions are truncated to.
    """

    def __init__(self, tokenizer: Any, max_length: int):
        self.tokenizer, self.max_length = tokenizer, max_length
        self.num_reported = 0
        """How many captions the last warning counted."""
        self._num_captions = self._num_cut = self._most_tokens = 0
        self._longest = ""

    def add(self, captions: Iterable[str]) -> None:
        """Counts captions; empty ones do not count."""
        present = (caption for caption in captions if caption.strip())
        while part := list(itertools.islice(present, 1024)):
            lengths = _num_tokens(self.tokenizer, part)
            self._num_captions += len(part)
            self._num_cut += sum(length > self.max_length for length in lengths)
            if max(lengths) > self._most_tokens:
                self._most_tokens = max(lengths)
                self._longest = part[lengths.index(self._most_tokens)]

    def warn(self) -> None:
        """Logs how many captions are cut, and what is cut from the longest, unless the last call reported as many."""
        if self._num_cut > self.num_reported:
            self.num_reported = self._num_cut
            rest = _cut_end(self.tokenizer, self._longest, self.max_length)
            logger.warning(
                f"{self._num_cut} of {self._num_captions} captions have more than max_sequence_length="
                f"{self.max_length} tokens, and their ends are cut; of the longest, with {self._most_tokens} tokens, "
                f"this is cut: {rest[:200]!r}{'...' if len(rest) > 200 else ''}"
            )


def _num_tokens(tokenizer: Any, texts: Sequence[str]) -> list[int]:
    """The number of tokens of each text before it is truncated."""
    if not texts:
        return []
    with _settings_kept(tokenizer):  # verbose would warn of another limit
        return [len(ids) for ids in tokenizer([prompt_clean(text) for text in texts], verbose=False).input_ids]


def _cut_end(tokenizer: Any, text: str, max_length: int) -> str:
    """The end of a text that truncation to `max_length` tokens cuts."""
    text = prompt_clean(text)
    with _settings_kept(tokenizer):
        whole = tokenizer(text, verbose=False).input_ids
        kept = tokenizer(text, max_length=max_length, truncation=True).input_ids
        cut = next(
            (index for index, pair in enumerate(zip(kept, whole, strict=False)) if pair[0] != pair[1]), len(kept)
        )
        if getattr(tokenizer, "is_fast", False):
            begin, _ = tokenizer(text, return_offsets_mapping=True, verbose=False).offset_mapping[cut]
            return text[begin:].strip()
        return tokenizer.decode(whole[cut:], skip_special_tokens=True)


def warn_unknown_words(tokenizer: Any, texts: Sequence[str]) -> None:
    """Logs a warning of the words outside a whole-word tokenizer's vocabulary, with the nearest known words."""
    words = list(dict.fromkeys(word for text in texts for word in unknown_words(tokenizer, text)))
    if words:
        matches = [get_close_matches(word, known_words(tokenizer), n=3, cutoff=0) for word in words[:3]]
        nearest = list(dict.fromkeys(word for rank in itertools.zip_longest(*matches) for word in rank if word))[:3]
        more = f" and {len(words) - 8} more words" if len(words) > 8 else ""
        logger.warning(
            "the prompt has words that this checkpoint was not trained with: "
            f"{', '.join(word[:30] for word in words[:8])}{more}; "
            f"the nearest known words: {', '.join(nearest)}"
        )


def unknown_words(tokenizer: Any, prompt: str) -> list[str]:
    """The words of a prompt that are not in a whole-word tokenizer's vocabulary; empty for other tokenizers."""
    vocabulary = set(known_words(tokenizer))
    if not vocabulary:
        return []
    words = _split(tokenizer, prompt)
    return [word for word in dict.fromkeys(words) if word not in vocabulary and word[:1].isalnum()]


def _split(tokenizer: Any, text: str) -> list[str]:
    """The words of a text, as a whole-word tokenizer looks them up in its vocabulary."""
    backend = tokenizer.backend_tokenizer
    text = prompt_clean(text)
    text = text if backend.normalizer is None else backend.normalizer.normalize_str(text)
    if backend.pre_tokenizer is None:
        return [text]
    return [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)]


def count_words(texts: Iterable[str]) -> Counter[str]:
    """How often each word of some texts occurs, with the words of `make_word_tokenizer`."""
    tokenizer = make_word_tokenizer([], max_length=1)
    return Counter(word for text in texts for word in _split(tokenizer, text))


def known_words(tokenizer: Any) -> list[str]:
    """The sorted vocabulary of a whole-word tokenizer without special tokens; empty for other tokenizers."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not isinstance(backend.model, models.WordLevel):
        return []
    special = set(tokenizer.all_special_tokens)
    return sorted(word for word in tokenizer.get_vocab() if word not in special)


def make_word_tokenizer(words: Sequence[str], max_length: int) -> PreTrainedTokenizerFast:
    """Creates a whole-word tokenizer.

    It ignores case, drops punctuation except commas, and appends `</s>` to each prompt.

    Args:
        words: The vocabulary, in lower case.
        max_length: Default maximum number of tokens.
    """
    vocabulary = {word: index for index, word in enumerate(["<pad>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    # a comma is a token, other punctuation is dropped
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[^\w,]+"), behavior="removed"),
            pre_tokenizers.Split(",", behavior="isolated"),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=max_length,
    )


def make_text_encoder(num_words: int, dim: int, num_layers: int, seed: int = 0) -> T5EncoderModel:
    """Creates a small T5 encoder with random weights, to be trained together with a denoiser.

    Args:
        num_words: Size of the tokenizer's vocabulary, including special tokens.
        dim: Channels of the embeddings, a multiple of 32. Attention heads have 32 channels.
        num_layers: Number of blocks.
        seed: Seed of the weights.
    """
    config = T5Config(
        vocab_size=num_words,
        d_model=dim,
        d_kv=32,
        d_ff=2 * dim,
        num_heads=dim // 32,
        num_layers=num_layers,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        use_cache=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return T5EncoderModel(config)
