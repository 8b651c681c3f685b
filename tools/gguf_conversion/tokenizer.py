"""tokenizer.json and tokenizer_config.json of a GGUF file."""

from gguf import TokenType

from .structure import ConversionError

QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_PATTERN = QWEN2_PATTERN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")

LONGEST_TOKEN = 2048  # characters: every way to cut one in two is looked at


def byte_level(use_regex, trim_offsets=True):
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": trim_offsets, "use_regex": use_regex}


def split_then_bytes(pattern):
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, byte_level(use_regex=False)]}


# tokenizer.ggml.pre -> (pre-tokenizer, normalizer, ignore_merges). A GGUF file says nothing of normalization, and llama.cpp
# does none; Qwen2's is NFC, as in the tokenizer.json that its authors publish and that its training text went through.
PRE_TOKENIZERS = {
    "smollm": (
        {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level(use_regex=True)],
        },
        None,
        False,
    ),
    "gpt-2": (byte_level(use_regex=True), None, False),
    "qwen2": (split_then_bytes(QWEN2_PATTERN), {"type": "NFC"}, False),
    "llama-bpe": (split_then_bytes(LLAMA3_PATTERN), None, True),
}


def added_token(index, content, special):
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": index, "content": content, **flags, "special": special}


def read_tokens(metadata, vocab_size):
    """Token -> id, and the entries of `added_tokens`."""
    tokens = metadata.need("tokenizer.ggml.tokens", [str])
    types = metadata.need("tokenizer.ggml.token_type", [int])
    if len(tokens) > vocab_size or len(types) != len(tokens):
        raise ConversionError(
            f"{metadata.path}: {len(tokens)} tokens and {len(types)} token types do not fit "
            f"an embedding of {vocab_size} rows"
        )
    vocab, added = {}, []
    for index, (token, kind) in enumerate(zip(tokens, types)):
        if kind == TokenType.UNUSED:  # rows that only pad the embedding
            continue
        if len(token) > LONGEST_TOKEN:
            raise ConversionError(
                f"{metadata.path}: token {index} has {len(token)} characters, {LONGEST_TOKEN} at most"
            )
        if token in vocab:
            raise ConversionError(
                f"{metadata.path}: the tokens {vocab[token]} and {index} have the same text {token!r}"
            )
        vocab[token] = index
        if kind in (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN):
            added.append(added_token(index, token, kind != TokenType.USER_DEFINED))
    return vocab, added


def template_processing(metadata, vocab, adds_bos):
    """The post-processor that puts the bos and eos tokens around a text, or None where neither is wanted."""
    text_of = {index: text for text, index in vocab.items()}
    wanted = []
    for name, default in (("bos", adds_bos), ("eos", False)):
        wanted.append(None)
        if metadata.get(f"tokenizer.ggml.add_{name}_token", bool, default):
            index = metadata.need(f"tokenizer.ggml.{name}_token_id", int)
            if index not in text_of:
                raise ConversionError(
                    f"{metadata.path}: tokenizer.ggml.{name}_token_id is {index}, no token has that id"
                )
            wanted[-1] = text_of[index]
    if wanted == [None, None]:
        return None

    def sequence(name, type_id):
        pieces = [wanted[0] and {"SpecialToken": {"id": wanted[0], "type_id": type_id}}]
        pieces.append({"Sequence": {"id": name, "type_id": type_id}})
        pieces.append(wanted[1] and {"SpecialToken": {"id": wanted[1], "type_id": type_id}})
        return [piece for piece in pieces if piece]

    specials = {t: {"id": t, "ids": [vocab[t]], "tokens": [t]} for t in wanted if t}
    return {
        "type": "TemplateProcessing",
        "single": sequence("A", 0),
        "pair": sequence("A", 0) + sequence("B", 1),
        "special_tokens": specials,
    }


def bpe_model(vocab, merges, **fields):
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None}
    model |= {"end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    return model | fields | {"vocab": vocab, "merges": merges}


def byte_level_tokenizer(metadata, vocab):
    """The normalizer, pre-tokenizer, decoder and model of tokenizer.ggml.model gpt2."""
    pre = metadata.need("tokenizer.ggml.pre", str)
    if pre not in PRE_TOKENIZERS:
        raise ConversionError(
            f"{metadata.path}: the pre-tokenizer {pre} is not known; known are {', '.join(sorted(PRE_TOKENIZERS))}"
        )
    pre_tokenizer, normalizer, ignore_merges = PRE_TOKENIZERS[pre]
    return {
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": template_processing(metadata, vocab, adds_bos=pre == "llama-bpe"),
        "decoder": byte_level(use_regex=True),
        "model": bpe_model(vocab, metadata.need("tokenizer.ggml.merges", [str]), ignore_merges=ignore_merges),
    }


def merges_of_scores(metadata, vocab):
    """SentencePiece joins the two neighbours whose joint piece scores highest; a list of merges says the same: every
    way to put a piece together of two others, the best piece first."""
    scores, types = metadata.need("tokenizer.ggml.scores", [float]), metadata.need("tokenizer.ggml.token_type", [int])
    if len(scores) != len(types):
        raise ConversionError(f"{metadata.path}: {len(scores)} scores and {len(types)} token types differ in number")
    merges = []
    for piece, index in vocab.items():
        if types[index] != TokenType.NORMAL:
            continue
        ways = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        ways = [(vocab[a], vocab[b], [a, b]) for a, b in ways if a in vocab and b in vocab]
        merges += [(-scores[index], index, left, right, pair) for left, right, pair in ways]
    return [merge[-1] for merge in sorted(merges)]


def sentencepiece_tokenizer(metadata, vocab):
    """The same of tokenizer.ggml.model llama: SentencePiece's BPE with byte fallback."""
    space = "\u2581"
    begins = metadata.get("tokenizer.ggml.add_space_prefix", bool, True)
    normalizers = [{"type": "Prepend", "prepend": space}] if begins else []
    normalizers.append({"type": "Replace", "pattern": {"String": " "}, "content": space})
    decoders = [{"type": "Replace", "pattern": {"String": space}, "content": " "}, {"type": "ByteFallback"}]
    decoders.append({"type": "Fuse"})
    if begins:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    unknown = metadata.get("tokenizer.ggml.unknown_token_id", int, 0)
    unk_token = next((token for token, index in vocab.items() if index == unknown), None)
    model = {"unk_token": unk_token, "fuse_unk": True, "byte_fallback": True}
    return {
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": None,
        "post_processor": template_processing(metadata, vocab, adds_bos=True),
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": bpe_model(vocab, merges_of_scores(metadata, vocab), **model),
    }


def build_tokenizer(metadata, vocab_size):
    kinds = {"gpt2": byte_level_tokenizer, "llama": sentencepiece_tokenizer}
    model = metadata.need("tokenizer.ggml.model", str)
    if model not in kinds:
        raise ConversionError(
            f"{metadata.path}: a tokenizer of model {model} is not supported; "
            "byte-level BPE (gpt2) and SentencePiece BPE (llama) are"
        )
    vocab, added = read_tokens(metadata, vocab_size)
    parts = kinds[model](metadata, vocab)
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, **parts}


def build_tokenizer_config(metadata, tokenizer, context_length):
    text_of = {index: text for text, index in tokenizer["model"]["vocab"].items()}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context_length,
        "clean_up_tokenization_spaces": False,
        "added_tokens_decoder": {
            str(t["id"]): {k: v for k, v in t.items() if k != "id"} for t in tokenizer["added_tokens"]
        },
    }
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        index = metadata.get(f"tokenizer.ggml.{theirs}_token_id", int)
        if index is not None:
            if index not in text_of:
                raise ConversionError(
                    f"{metadata.path}: tokenizer.ggml.{theirs}_token_id is {index}, which is no token of the vocabulary"
                )
            config[f"{ours}_token"] = text_of[index]
    template = metadata.get("tokenizer.chat_template", str)
    if template:
        config["chat_template"] = template
    return config
