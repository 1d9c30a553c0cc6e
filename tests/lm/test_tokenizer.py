"""Text survives the round trip; special tokens and chat templates follow the files."""

import json
import pickle
import random

import numpy as np
import pytest

from research.lm.tokenizer import Tokenizer

ALPHABETS = (
    "abc XYZ 0123456789 .,!?()[]{}<>|=+-*/^_\\\"'`~@#$%&",
    " \t\n\r\u00a0\u2003\u200b\ufeff",
    "äßñçøÅπΩжЯאبहिन्दी漢字かな한국어",
    "👍🏽👩‍👩‍👧🇫🇷\U0001d54f\U00020000",
    "e\u0301a\u0308\u1100\u1161",  # composed by normalisers that should not be there
    "\x00\x01\x7f\x80\xff\ufffd\uffff",
)
CORPUS = ["the cat sat on the mat, the hat and the bat", "3 + 14 = 17, so the answer is 17"] * 20
QWEN_LIKE = (
    "{%- if messages[0].role == 'system' %}{{- '<|im_start|>system\\n' + messages[0].content "
    "+ '<|im_end|>\\n' }}{%- endif %}\n"
    "{%- for message in messages if message.role != 'system' %}\n"
    "    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and not enable_thinking %}{{- '<think>\\n\\n</think>' }}"
    "{%- endif %}{%- endif %}\n"
)


def random_texts(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    texts = ["", " ", "\n\n", "<|endoftext|>", "a<|endoftext|>b"]
    for _ in range(count):
        alphabets = rng.sample(ALPHABETS, rng.randint(1, len(ALPHABETS)))
        text = "".join(rng.choice(rng.choice(alphabets)) for _ in range(rng.randint(1, 60)))
        texts.append(text)
    return texts


def byte_and_bpe() -> list[Tokenizer]:
    return [
        Tokenizer.byte(["<think>", "</think>"]),
        Tokenizer.train_bpe(CORPUS, 300, ["<think>", "</think>"]),
    ]


@pytest.mark.parametrize("tokenizer", byte_and_bpe(), ids=["byte", "bpe"])
@pytest.mark.parametrize("allow_special", [True, False])
def test_any_text_round_trips(tokenizer, allow_special):
    texts = random_texts(300)
    rows = tokenizer.encode_batch(texts, allow_special=allow_special)
    assert [row.dtype for row in rows] == [np.int32] * len(texts)
    assert all(row.max(initial=0) < tokenizer.vocab_size for row in rows)
    assert tokenizer.decode_batch(rows) == texts
    for text, row in list(zip(texts, rows, strict=True))[::20]:
        np.testing.assert_array_equal(tokenizer.encode(text, allow_special=allow_special), row)
        assert tokenizer.decode(row) == text


def test_bytes_are_their_own_ids():
    tokenizer = Tokenizer.byte(["<think>"])
    for text in random_texts(100, seed=1)[3:]:
        ids = tokenizer.encode(text, allow_special=False)
        assert ids.tolist() == list(text.encode())
    assert tokenizer.encode("é<think>").tolist() == [0xC3, 0xA9, 256]
    assert tokenizer.token_id("<think>") == 256
    assert (tokenizer.eos_id, tokenizer.pad_id, tokenizer.bos_id) == (257, 257, None)
    assert tokenizer.vocab_size == 258
    assert tokenizer.decode([0xC3]) == "\ufffd"


def test_special_tokens_in_foreign_text_can_be_read_as_characters():
    for tokenizer in byte_and_bpe():
        text = "7<|endoftext|>"
        assert tokenizer.eos_id == tokenizer.encode(text)[-1]
        assert tokenizer.eos_id not in tokenizer.encode(text, allow_special=False)
        assert tokenizer.eos_id == tokenizer.encode(text)[-1]  # the switch left no trace


def test_skip_special_drops_special_tokens_only():
    for tokenizer in byte_and_bpe():
        ids = tokenizer.encode("a <think>b</think>c<|endoftext|>")
        assert tokenizer.decode(ids, skip_special=True) == "a bc"


def test_bpe_merges_words_but_never_digits_and_is_deterministic():
    tokenizer = Tokenizer.train_bpe(CORPUS, 300)
    assert len(tokenizer.encode("the cat")) < len("the cat")
    assert len(tokenizer.encode("1417")) == 4
    again = Tokenizer.train_bpe(iter(CORPUS), 300)
    assert again.encode(CORPUS[0]).tolist() == tokenizer.encode(CORPUS[0]).tolist()
    assert tokenizer.eos_id == 0 and tokenizer.vocab_size <= 300
    with pytest.raises(ValueError, match="at least 257"):
        Tokenizer.train_bpe(CORPUS, 256)


WORDS = ["<pad>", *map(str, range(10)), "*3", "+4", "<think>", "</answer>", "wait", "=", "$"]


def test_words_one_id_each_in_order():
    tokenizer = Tokenizer.words(WORDS, eos="$", pad="<pad>")
    assert tokenizer.encode("  <think> 4 *3\nwait </answer> $").tolist() == [
        WORDS.index(word) for word in ["<think>", "4", "*3", "wait", "</answer>", "$"]
    ]
    assert (tokenizer.pad_id, tokenizer.eos_id) == (0, len(WORDS) - 1)
    assert tokenizer.vocab_size == len(WORDS) and tokenizer.stop_ids == (len(WORDS) - 1,)
    rng = random.Random(0)
    for _ in range(50):
        text = " ".join(rng.choices(WORDS, k=rng.randint(0, 12)))
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode("4 $ <pad> 5"), skip_special=True) == "4 5"


def test_words_refuses_what_it_cannot_say():
    tokenizer = Tokenizer.words(WORDS)
    with pytest.raises(ValueError, match="maybe"):
        tokenizer.encode_batch(["4 *3", "4 maybe"])
    with pytest.raises(ValueError, match="repeated words.*'a'"):
        Tokenizer.words(["a", "b", "a"])
    with pytest.raises(ValueError, match="not one word"):
        Tokenizer.words(["a b"])
    with pytest.raises(ValueError, match="not a token"):
        Tokenizer.words(["a"], eos="$")
    assert tokenizer.eos_id is None and tokenizer.pad_id is None and tokenizer.stop_ids == ()


def test_bad_input_is_named():
    tokenizer = Tokenizer.byte()
    with pytest.raises(ValueError, match="text 1 is not valid Unicode"):
        tokenizer.encode_batch(["a", "\ud800"])
    with pytest.raises(ValueError, match="text 0 is int"):
        tokenizer.encode_batch([3])


def test_save_load_and_pickle_keep_everything(tmp_path):
    kept = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}{{ eos_token }}"
    originals = [
        Tokenizer.byte(["<think>"], bos="<s>", pad="<pad>", chat_template=kept),
        Tokenizer.train_bpe(CORPUS, 300, bos="<s>", chat_template=kept),
        Tokenizer.words(WORDS, eos="$", pad="<pad>", bos="=", chat_template=kept),
    ]
    for index, original in enumerate(originals):
        original.save(tmp_path / str(index))
        loaded = Tokenizer.load(tmp_path / str(index))
        original.encode("4", allow_special=False)  # builds the copy that pickling leaves out
        for copy in (loaded, pickle.loads(pickle.dumps(original))):
            for name in ("bos_id", "eos_id", "pad_id", "stop_ids", "vocab_size", "chat_template"):
                assert getattr(copy, name) == getattr(original, name)
            texts = random_texts(30) if index < 2 else ["4 *3 $", "wait = <think>"]
            for a, b in zip(copy.encode_batch(texts), original.encode_batch(texts), strict=True):
                np.testing.assert_array_equal(a, b)
            assert copy.apply_chat_template([{"role": "user", "content": "hi"}]) == (
                f"{original.bos_token}hi{original.eos_token}"
            )


def published(directory, config, *, generation=None, model=None, template=None):
    """A directory as published models have it, made of a byte vocabulary."""
    backend = Tokenizer.byte(["<|im_start|>", "<|im_end|>", "<s>"])
    backend.save(directory)
    for name in ("tokenizer_config.json", "generation_config.json"):
        (directory / name).unlink()
    for name, content in (
        ("tokenizer_config.json", config),
        ("generation_config.json", generation),
        ("config.json", model),
    ):
        if content is not None:
            (directory / name).write_text(json.dumps(content))
    if template is not None:
        (directory / "chat_template.jinja").write_text(template)
    return directory


def test_special_tokens_as_strings_dicts_and_ids(tmp_path):
    as_dict = {"__type": "AddedToken", "content": "<|im_end|>", "special": True}
    tokenizer = Tokenizer.load(
        published(
            tmp_path / "dict",
            {"bos_token": "<s>", "eos_token": as_dict, "pad_token": as_dict},
            generation={"eos_token_id": [257, 259], "temperature": 0.6},
        )
    )
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (258, 257, 257)
    assert tokenizer.stop_ids == (257, 259)
    tokenizer.save(tmp_path / "again")
    saved = json.loads((tmp_path / "again" / "generation_config.json").read_text())
    assert saved["eos_token_id"] == [257, 259] and saved["temperature"] == 0.6
    assert Tokenizer.load(tmp_path / "again").stop_ids == (257, 259)

    ids = {"bos_token_id": 258, "eos_token_id": 259}
    tokenizer = Tokenizer.load(published(tmp_path / "ids", None, model=ids))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (258, 259, 259)
    assert Tokenizer.load(tmp_path / "ids" / "tokenizer.json").eos_id is None

    with pytest.raises(ValueError, match="eos_token '</s>'.*tokenizer_config.json"):
        Tokenizer.load(published(tmp_path / "wrong", {"eos_token": "</s>"}))


def test_published_ends_are_added_once(tmp_path):
    config = {"bos_token": "<s>", "eos_token": "<|im_end|>", "add_bos_token": True}
    tokenizer = Tokenizer.load(published(tmp_path, config))
    assert tokenizer.encode("a", add_special=True).tolist() == [258, 97]
    assert tokenizer.encode("<s>a", add_special=True).tolist() == [258, 97]
    assert tokenizer.encode("", add_special=True).tolist() == [258]
    assert tokenizer.encode("a").tolist() == [97]
    config["add_eos_token"] = True
    tokenizer = Tokenizer.load(published(tmp_path, config))
    assert tokenizer.encode("a", add_special=True).tolist() == [258, 97, 257]


def test_chat_template_renders_turns_and_variables(tmp_path):
    config = {"eos_token": "<|im_end|>", "chat_template": QWEN_LIKE}
    tokenizer = Tokenizer.load(published(tmp_path / "config", config))
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}]
    prompt = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n1+1?<|im_end|>\n"
    assert tokenizer.apply_chat_template(talk, add_generation_prompt=False) == prompt
    opened = prompt + "<|im_start|>assistant\n"
    assert tokenizer.apply_chat_template(talk) == opened
    assert tokenizer.apply_chat_template(talk, enable_thinking=False) == (
        opened + "<think>\n\n</think>"
    )
    ids = tokenizer.encode(opened)
    assert (ids == tokenizer.token_id("<|im_start|>")).sum() == 3

    named = [{"name": "tool", "template": "no"}, {"name": "default", "template": "yes"}]
    path = published(tmp_path / "named", {"chat_template": named})
    assert Tokenizer.load(path).apply_chat_template(talk) == "yes"
    path = published(tmp_path / "file", {"chat_template": "config"}, template="file")
    assert Tokenizer.load(path).apply_chat_template(talk) == "file"


@pytest.mark.parametrize(
    "template, reason",
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% if %}", "Expected"),
        (None, "no chat template"),
    ],
)
def test_chat_template_errors_and_escapes_are_refused(template, reason):
    tokenizer = Tokenizer.byte(chat_template=template)
    with pytest.raises(ValueError, match=reason):
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}])


def test_missing_and_broken_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no .*tokenizer.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="tokenizer.json"):
        Tokenizer.load(tmp_path)
    published(tmp_path / "config", None)
    (tmp_path / "config" / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(ValueError, match="JSON object"):
        Tokenizer.load(tmp_path / "config")


@pytest.mark.parity
def test_transformers_reads_the_same_tokenizer(tmp_path):
    transformers = pytest.importorskip("transformers")
    talk = [{"role": "user", "content": "3 + 14 = ?"}, {"role": "assistant", "content": "17"}]
    for index, (ours, texts) in enumerate(
        [
            (Tokenizer.byte(["<think>"], bos="<s>", chat_template=QWEN_LIKE), random_texts(100)),
            (Tokenizer.train_bpe(CORPUS, 300, chat_template=QWEN_LIKE), random_texts(100)),
            (Tokenizer.words(WORDS, eos="$", chat_template=QWEN_LIKE), ["4 *3 wait $"]),
        ]
    ):
        ours.save(tmp_path / str(index))
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / str(index))
        for text in texts:
            assert theirs(text)["input_ids"] == ours.encode(text).tolist()
        assert theirs.eos_token_id == ours.eos_id and theirs.pad_token_id == ours.pad_id
        rendered = theirs.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
        assert rendered == ours.apply_chat_template(talk)


@pytest.mark.parity
def test_a_published_tokenizer_is_read_as_transformers_reads_it(tmp_path):
    """Normalisation, a splitting expression and a begin token, as Qwen's and Llama's have."""
    transformers = pytest.importorskip("transformers")
    import tokenizers as hub
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

    backend = hub.Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    split = hub.Regex(r"\p{N}|[^\s\p{L}\p{N}]+|\s*\p{L}+|\s+")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(split, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    specials = ["<s>", "</s>", "<|User|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=290,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    backend.enable_truncation(8)  # left in some published files; must not cut texts
    backend.save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = Tokenizer.load(tmp_path)
    for text in [*random_texts(100), "the cat <|User|> sat</s>"]:
        ids = ours.encode(text)
        assert theirs(text, add_special_tokens=False, truncation=False)["input_ids"] == ids.tolist()
        with_ends = ours.encode(text, add_special=True)
        assert theirs(text, truncation=False)["input_ids"] == with_ends.tolist()
        assert theirs.decode(with_ends) == ours.decode(with_ends)
        assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids, skip_special=True)


def test_prompts_begin_as_published_and_do_not_end(tmp_path):
    plain = Tokenizer.words(["a", "b", "<s>", "</s>"], bos="<s>", eos="</s>", pad="</s>")
    assert plain.encode_prompts(["a b"])[0].tolist() == plain.encode("a b").tolist()
    plain.save(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings |= {"add_bos_token": True, "add_eos_token": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    published = Tokenizer.load(tmp_path)
    begin, a, b = (published.token_id(word) for word in ("<s>", "a", "b"))
    assert [row.tolist() for row in published.encode_prompts(["a b", "<s> b", ""])] == [
        [begin, a, b],
        [begin, b],
        [begin],
    ]
