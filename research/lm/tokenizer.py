"""Text to token ids and back: one class over `tokenizers`, for every kind of vocabulary used here.

    Tokenizer.byte(['<think>'])          one id per UTF-8 byte; nothing to train
    Tokenizer.words(['4', '*3', '$'])    one id per whitespace-separated word
    Tokenizer.train_bpe(texts, 4096)     byte-level BPE, digits one by one
    Tokenizer.load(directory)            a published model's tokenizer.json with its chat template

A tokenizer pickles (data loaders send it to their workers) and is deterministic.
"""

from __future__ import annotations

import datetime
import functools
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jinja2
import jinja2.sandbox
import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

EOS = "<|endoftext|>"
_ROLES = ("bos", "eos", "pad")


class Tokenizer:
    """Encodes and decodes; knows its begin, end and padding tokens and its chat template.

    Attributes:
        bos_id, eos_id, pad_id: int ids, or None where the vocabulary has no such token.
            Padding falls back to the end token, as in most published decoders; so mask by
            length, never by id.
        stop_ids: every id that ends generation: `eos_id` and those listed by a model's
            generation_config.json.
        vocab_size: one more than the largest id. A published model's embedding is often larger.
        chat_template: the Jinja source, or None.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos: str | None = None,
        eos: str | None = None,
        pad: str | None = None,
        chat_template: str | None = None,
        config: Mapping[str, Any] | None = None,
        generation_config: Mapping[str, Any] | None = None,
    ):
        """`config` and `generation_config` are files' contents, kept for `save`."""
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._literal: tokenizers.Tokenizer | None = None  # a copy blind to special tokens
        self._config = dict(config or {})
        self._generation_config = dict(generation_config or {})
        self.chat_template = chat_template
        self.bos_token, self.eos_token, self.pad_token = bos, eos, pad if pad is not None else eos
        self.bos_id = None if bos is None else self.token_id(bos)
        self.eos_id = None if eos is None else self.token_id(eos)
        self.pad_id = None if self.pad_token is None else self.token_id(self.pad_token)
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.stop_ids = _stop_ids(self.eos_id, self._generation_config)

    # Construction.

    @classmethod
    def byte(
        cls,
        special_tokens: Sequence[str] = (),
        *,
        bos: str | None = None,
        eos: str | None = EOS,
        pad: str | None = None,
        chat_template: str | None = None,
    ) -> Tokenizer:
        """Byte b of the UTF-8 text is id b; special tokens follow from 256.

        The ids are those of `special_tokens` in order, then of bos, eos and pad if not listed.
        """
        alphabet = {character: byte for byte, character in enumerate(_byte_characters())}
        backend = tokenizers.Tokenizer(models.BPE(vocab=alphabet, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens(_specials(special_tokens, bos, eos, pad))
        return cls(backend, bos=bos, eos=eos, pad=pad, chat_template=chat_template)

    @classmethod
    def words(
        cls,
        words: Sequence[str],
        *,
        bos: str | None = None,
        eos: str | None = None,
        pad: str | None = None,
        chat_template: str | None = None,
    ) -> Tokenizer:
        """One id per word, in the order given; text is words separated by white space.

        bos, eos and pad are taken from `words`. Decoding puts one space between words, so
        texts come back with their white space normalised. A word that is not in the list cannot
        be encoded (ValueError).

        Raises:
            ValueError: a repeated or empty word, a word with white space in it, or a special
                token that is not among the words.
        """
        for word in words:
            if word.split() != [word]:
                raise ValueError(f"{word!r} is not one word: it is empty or has white space in it")
        vocabulary = {word: index for index, word in enumerate(words)}
        if len(vocabulary) < len(words):
            raise ValueError(f"repeated words: {sorted({w for w in words if words.count(w) > 1})}")
        backend = tokenizers.Tokenizer(models.WordLevel(vocabulary))  # no unknown word
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        ends = [word for word in _specials((), bos, eos, pad) if word in vocabulary]
        backend.add_special_tokens(
            [tokenizers.AddedToken(word, single_word=True, normalized=False) for word in ends]
        )
        return cls(backend, bos=bos, eos=eos, pad=pad, chat_template=chat_template)

    @classmethod
    def train_bpe(
        cls,
        texts: Iterable[str],
        vocab_size: int,
        special_tokens: Sequence[str] = (),
        *,
        bos: str | None = None,
        eos: str | None = EOS,
        pad: str | None = None,
        chat_template: str | None = None,
    ) -> Tokenizer:
        """Byte-level BPE learned from `texts`; digits are never merged. Special tokens come first.

        The vocabulary is smaller than `vocab_size` when the texts run out of pairs to merge.

        Raises:
            ValueError: `vocab_size` is below 256 and the special tokens.
        """
        specials = _specials(special_tokens, bos, eos, pad)
        if vocab_size < 256 + len(specials):
            raise ValueError(
                f"vocab_size={vocab_size} must be at least {256 + len(specials)}: 256 bytes and "
                f"{len(specials)} special tokens"
            )
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=specials,
            initial_alphabet=_byte_characters(),
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer)
        return cls(backend, bos=bos, eos=eos, pad=pad, chat_template=chat_template)

    @classmethod
    def load(cls, path: str | pathlib.Path) -> Tokenizer:
        """Reads a tokenizer.json, or a directory that holds one and its companions.

        Companions, all optional: tokenizer_config.json and special_tokens_map.json (special
        tokens, chat template), chat_template.jinja, generation_config.json and config.json (ids
        of special tokens).

        Raises:
            FileNotFoundError: no tokenizer.json.
            ValueError: a file that does not parse, or a special token outside the vocabulary.
        """
        path = pathlib.Path(path)
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            held = sorted(p.name for p in path.iterdir())[:12] if path.is_dir() else "nothing"
            raise FileNotFoundError(
                f"no {file}. A tokenizer.json is needed (for vocab.json or tokenizer.model files, "
                f"convert with transformers' AutoTokenizer and save_pretrained); found {held}"
            )
        try:
            backend = tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8"))
        except Exception as error:  # `tokenizers` raises bare Exception
            raise ValueError(f"{file} is not a tokenizer.json that can be read: {error}") from error
        if not path.is_dir():
            return cls(backend)
        config = _read_json(path / "tokenizer_config.json")
        generation = _read_json(path / "generation_config.json")
        tokens = _read_json(path / "special_tokens_map.json") | config
        ids = _read_json(path / "config.json") | generation
        found = {role: _special_token(backend, role, tokens, ids, path) for role in _ROLES}
        template_file = path / "chat_template.jinja"
        template = config.pop("chat_template", None)
        if template_file.is_file():
            template = template_file.read_text(encoding="utf-8")
        elif isinstance(template, list):  # several named ones
            named = {entry["name"]: entry["template"] for entry in template}
            template = named.get("default") or next(iter(named.values()), None)
        return cls(
            backend, **found, chat_template=template, config=config, generation_config=generation
        )

    def save(self, directory: str | pathlib.Path) -> None:
        """Writes what `load` and transformers' AutoTokenizer read; makes the directory.

        The files are tokenizer.json, tokenizer_config.json, chat_template.jinja (with a template)
        and generation_config.json (with an end token).
        """
        directory = pathlib.Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self._backend.save(str(directory / "tokenizer.json"))
        roles = {f"{role}_token": getattr(self, f"{role}_token") for role in _ROLES}
        config = {"tokenizer_class": "PreTrainedTokenizerFast"} | self._config | roles
        _write_json(directory / "tokenizer_config.json", config)
        if self.chat_template is not None:
            text = directory / "chat_template.jinja"
            text.write_text(self.chat_template, encoding="utf-8")
        if self.stop_ids:
            stop = self.stop_ids[0] if len(self.stop_ids) == 1 else list(self.stop_ids)
            ids = {"bos_token_id": self.bos_id, "eos_token_id": stop, "pad_token_id": self.pad_id}
            known = {key: value for key, value in ids.items() if value is not None}
            _write_json(directory / "generation_config.json", self._generation_config | known)

    # Text and ids.

    def encode(
        self, text: str, *, allow_special: bool = True, add_special: bool = False
    ) -> np.ndarray:
        """Ids [n] int32 of a text. See `encode_batch`."""
        return self.encode_batch([text], allow_special=allow_special, add_special=add_special)[0]

    def encode_batch(
        self, texts: Sequence[str], *, allow_special: bool = True, add_special: bool = False
    ) -> list[np.ndarray]:
        """Ids of many texts, each [n] int32; the batch is spread over threads.

        Args:
            texts: any Unicode without lone surrogates.
            allow_special: False reads '<|endoftext|>' in a text as those characters, which is
                what text from outside deserves. (A word of a `words` vocabulary stays a word.)
            add_special: adds the begin and end tokens the model was published with. Not for
                texts of a chat template, which writes its own.

        Raises:
            ValueError: a text that cannot be encoded, with the reason.
        """
        backend = self._backend if allow_special else self._blind()
        try:
            encodings = backend.encode_batch_fast(list(texts), add_special_tokens=add_special)
        except Exception as error:  # `tokenizers` raises bare Exception and TypeError
            raise ValueError(self._refusal(texts, error)) from error
        rows = [np.array(encoding.ids, np.int32) for encoding in encodings]
        if add_special:
            rows = [self._published_ends(row) for row in rows]
        return rows

    def encode_prompts(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of plain texts to be continued, each [n] int32.

        They have the begin token if the model was published with one, and no end token. Texts of a
        chat template write their own: `encode_batch`.
        """
        rows = self.encode_batch(texts)
        if self.bos_id is None or self.bos_id not in self.encode("", add_special=True)[:1]:
            return rows
        begin = np.array([self.bos_id], np.int32)
        return [row if self.bos_id in row[:1] else np.concatenate([begin, row]) for row in rows]

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """Text of ids. Broken UTF-8 becomes U+FFFD; an id outside the vocabulary is left out."""
        ids = np.asarray(ids, np.int64).tolist()
        return self._backend.decode(ids, skip_special_tokens=skip_special)

    def decode_batch(
        self, sequences: Sequence[Iterable[int]], skip_special: bool = False
    ) -> list[str]:
        """Texts of many sequences of ids."""
        rows = [np.asarray(ids, np.int64).tolist() for ids in sequences]
        return self._backend.decode_batch(rows, skip_special_tokens=skip_special)

    def token_id(self, token: str) -> int:
        """Id of one token of the vocabulary (ValueError if it is none)."""
        index = self._backend.token_to_id(token)
        if index is None:
            raise ValueError(f"{token!r} is not a token of this vocabulary")
        return index

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The text of a conversation as the model was trained to see it.

        Args:
            messages: [{'role': 'user', 'content': '...'}, ...].
            add_generation_prompt: end with the opening of the assistant's turn.
            variables: others that the template reads, such as `enable_thinking` or `tools`.

        Raises:
            ValueError: there is no template, or it refuses the conversation.
        """
        if self.chat_template is None:
            raise ValueError("this tokenizer has no chat template; give it one (`chat_template=`)")
        tokens = {f"{role}_token": getattr(self, f"{role}_token") or "" for role in _ROLES}
        inputs = tokens | {"tools": None, "documents": None} | variables
        try:
            return _compile_template(self.chat_template).render(
                messages=messages, add_generation_prompt=add_generation_prompt, **inputs
            )
        except (jinja2.TemplateError, TypeError) as error:
            raise ValueError(f"the chat template refuses this conversation: {error}") from error

    # Helpers.

    def _blind(self) -> tokenizers.Tokenizer:
        if self._literal is None:  # a copy: the switch is state of the whole object
            self._literal = tokenizers.Tokenizer.from_str(self._backend.to_str())
            self._literal.encode_special_tokens = True
        return self._literal

    def _published_ends(self, row: np.ndarray) -> np.ndarray:
        """The ends that tokenizer_config.json asks for where tokenizer.json left them out."""
        first, last = self.bos_id, self.eos_id
        if self._config.get("add_bos_token") and first is not None and first not in row[:1]:
            row = np.concatenate([np.array([first], np.int32), row])
        if self._config.get("add_eos_token") and last is not None and last not in row[-1:]:
            row = np.concatenate([row, np.array([last], np.int32)])
        return row

    def _refusal(self, texts: Sequence[str], error: Exception) -> str:
        for index, text in enumerate(texts):
            if not isinstance(text, str):
                return f"text {index} is {type(text).__name__}, not str"
            try:
                text.encode()
            except UnicodeEncodeError as problem:
                return f"text {index} is not valid Unicode: {problem}"
        if isinstance(self._backend.model, models.WordLevel):
            known = self._backend.get_vocab()
            unknown = [word for text in texts for word in text.split() if word not in known]
            return f"words outside the vocabulary of {len(known)}: {sorted(set(unknown))[:10]}"
        return str(error)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_literal": None}


def _byte_characters() -> list[str]:
    """The printable character that stands for each byte in byte-level vocabularies (GPT-2's map).

    Bytes that print as Latin-1 stand for themselves; the others, in order, for U+0100 and on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _specials(tokens: Sequence[str], *roles: str | None) -> list[str]:
    return list(dict.fromkeys([*tokens, *(role for role in roles if role is not None)]))


def _stop_ids(eos_id: int | None, generation_config: Mapping[str, Any]) -> tuple[int, ...]:
    listed = generation_config.get("eos_token_id")
    listed = listed if isinstance(listed, list) else [listed]
    return tuple(dict.fromkeys(int(i) for i in [eos_id, *listed] if i is not None))


def _special_token(
    backend: tokenizers.Tokenizer,
    role: str,
    tokens: Mapping[str, Any],
    ids: Mapping[str, Any],
    directory: pathlib.Path,
) -> str | None:
    """A special token by name (a string or an AddedToken's dict), else by its id."""
    token = tokens.get(f"{role}_token")
    if isinstance(token, Mapping):
        token = token["content"]
    if token is None:
        index = ids.get(f"{role}_token_id")
        index = index[0] if isinstance(index, list) and index else index
        token = backend.id_to_token(index) if isinstance(index, int) and index >= 0 else None
    if token is not None and backend.token_to_id(token) is None:
        raise ValueError(
            f"{role}_token {token!r} of {directory / 'tokenizer_config.json'} is not in "
            f"{directory / 'tokenizer.json'}; add it to the one or remove it from the other"
        )
    return token


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, not a {type(content).__name__}")
    return content


def _write_json(path: pathlib.Path, content: Mapping[str, Any]) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


@functools.lru_cache(maxsize=8)
def _compile_template(source: str) -> jinja2.Template:
    """A template comes with a model from outside: sandboxed. Settings as published ones expect."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )

    def refuse(message: str):
        raise jinja2.TemplateError(message)

    def tojson(value: Any, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(source)
