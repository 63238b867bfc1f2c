"""What a run's data and tokenizer must satisfy, in training and in evaluation alike, before the model is built."""

import contextlib
import io
from argparse import Namespace
from pathlib import Path

from megatron_hybrid.data import provenance
from megatron_hybrid.data.blend import DEFAULT_SPLIT, check_parts, split_fractions
from megatron_hybrid.data.tokenizers import TokenizerSpec, load_tokenizer
from megatron_hybrid.training import datasets, megatron_tokenizer


def check_data(args: Namespace) -> None:
    """Refuses a run without data, or whose data files are not there or too small, before any process group starts.

    Raises:
        ValueError: With the file and how to make it.
    """
    named = datasets.blends(args)
    listed = list(dict.fromkeys(prefix for blend in named.all() for prefix in blend.prefixes))
    if args.mock_data:
        return
    if not listed:
        raise ValueError(
            "The run has no data: give --data-path PREFIX (made by tools/preprocess_data.py), --data-blend FILE, "
            "or --mock-data for random tokens."
        )
    for prefix in listed:
        missing = [prefix + end for end in (".idx", ".bin") if not Path(prefix + end).is_file()]
        if missing:
            raise ValueError(
                f"{prefix}, which is given as data: there is no {missing[0]}. Give the prefix of a .bin/.idx pair, "
                "without the ending; tools/preprocess_data.py makes one from text."
            )
    if not (args.data_path or args.data_args_path):
        if args.eval_iters and not args.full_validation and not (named.per_split and named.per_split[1]):
            raise ValueError(
                f"--eval-iters is {args.eval_iters}, and there is no validation data: add --valid-data-path (or valid "
                "in the file of --per-split-data-args-path), or give --eval-iters 0."
            )
        return
    split, trains = args.split or DEFAULT_SPLIT, not args.skip_train
    ends = split_fractions(split, trains)
    if args.eval_iters and ends[1] == ends[0]:
        raise ValueError(
            f"--split {split} leaves nothing for validation, and --eval-iters is {args.eval_iters}: give "
            "--eval-iters 0, or a part such as --split 98,1,1."
        )
    for prefix in listed:
        check_parts(prefix, split, trains)


def check_tokenizer(args: Namespace) -> None:
    """Refuses a run whose vocabulary is not known.

    Raises:
        ValueError: With the flag that is missing, or the file that is not there.
    """
    kind, model = args.tokenizer_type, args.tokenizer_model
    if kind is None:
        raise ValueError(
            "The run has no tokenizer: give --tokenizer-type SentencePieceTokenizer --tokenizer-model FILE (made by "
            "tools/train_tokenizer.py), or --tokenizer-type NullTokenizer --vocab-size N for data without text."
        )
    if kind.startswith("Null") and args.vocab_size is None:
        raise ValueError(f"--tokenizer-type {kind} has no vocabulary of its own: give --vocab-size.")
    if kind.endswith("SentencePieceTokenizer") and not (model and Path(model).is_file()):
        raise ValueError(f"--tokenizer-type {kind}: there is no file --tokenizer-model {model}.")


def check_provenance(args: Namespace) -> list[str]:
    """Refuses data that another tokenizer wrote than the run's, going by their manifests; reads no data.

    Returns:
        Notes on what could not be compared, to be shown to the user.

    Raises:
        ValueError: With the data set and both tokenizers.
    """
    if args.mock_data:
        return []
    spec = _tokenizer_spec(args)
    run = provenance.RunTokenizer(spec, args.null_tokenizer_eod_id, args.reset_attention_mask, args.eod_mask_loss)
    return provenance.check(datasets.prefixes(args), run)


def compare_tokenizer(args: Namespace) -> None:
    """Refuses a tokenizer that Megatron loads otherwise than the data's, whose fingerprint it has.

    Raises:
        ValueError: With what differs.
    """
    from megatron.training import global_vars

    spec = _tokenizer_spec(args)
    if args.mock_data or provenance.unknown(spec):
        return
    prefix = provenance.first_known(datasets.prefixes(args))
    if prefix is not None:
        megatron_tokenizer.compare(prefix, spec, global_vars.get_tokenizer())


def _tokenizer_spec(args: Namespace) -> TokenizerSpec:
    """The run's tokenizer as preprocessing knows it."""
    return TokenizerSpec(
        args.tokenizer_type,
        Path(args.tokenizer_model) if args.tokenizer_model else None,
        pattern=args.tiktoken_pattern or TokenizerSpec.pattern,
        num_special_tokens=args.tiktoken_num_special_tokens,
        vocab_size=args.vocab_size or TokenizerSpec.vocab_size,
    )


def vocabulary(args: Namespace) -> int | None:
    """Size of the vocabulary before the run has its tokenizer: that of the tokenizer's files, else --vocab-size.

    A SentencePiece or Hugging Face tokenizer has a size of its own, whatever --vocab-size says.
    """
    spec = _tokenizer_spec(args)
    if spec.model is None or not spec.model.exists() or spec.kind == "TikTokenizer" or provenance.unknown(spec):
        return args.vocab_size
    return load_tokenizer(spec).vocab_size


def check_data_content(args: Namespace, stored: Namespace | None = None) -> list[str]:
    """Refuses data that are damaged or do not fit the model (:func:`.datasets.check_content`).

    Args:
        args: Megatron's, validated.
        stored: The arguments in the checkpoint that is loaded; None if there are none.

    Returns:
        Notes for the user, also on data that are others than those that the checkpoint was trained on.
    """
    notes = datasets.check_content(args)
    before = {} if args.skip_train else getattr(stored, "data_contents", {})
    for prefix, content in args.data_contents.items():
        if before.get(prefix, content) != content:
            notes.append(
                f"{prefix} has another content than when {args.checkpoint} was saved: the order of its documents is a "
                "new one"
            )
    return notes


def check_end_of_document(args: Namespace) -> None:
    """Refuses to keep packed documents apart (``--reset-attention-mask``) without a token that ends them.

    Raises:
        ValueError: With the tokenizer.
    """
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

    if not args.reset_attention_mask:
        return
    with contextlib.redirect_stdout(io.StringIO()):  # it is built again with the data, and says so then
        eod = getattr(build_tokenizer(args), "eod", None)
    if eod is None or eod < 0:
        raise ValueError(
            "--reset-attention-mask finds documents by their last token, and the tokenizer "
            f"({args.tokenizer_type}) has no end-of-document token: use one that has, or drop the flag."
        )
