"""Upstream code that is relied on for checkpoints."""

from tests.patches.contract import ASYNC, DCP, TRAINING, Contract

_C = Contract
CONTRACTS = [
    _C(
        "schedule",
        TRAINING,
        "get_optimizer_param_scheduler",
        "optimizer",
        ("wsd_decay_steps=wsd_decay_steps", "lr_warmup_steps = args.lr_warmup_fraction * lr_decay_steps"),
    ),
    _C(
        "schedule",
        "core/optimizer_param_scheduler.py",
        "OptimizerParamScheduler.state_dict",
        holds=("'lr_decay_steps': self.lr_decay_steps",),
        lacks=("wsd",),
    ),
    _C("stored_common", "training/checkpointing.py", "generate_state_dict", holds=("state_dict['args'] = args",)),
    _C(
        "choose_checkpoint",
        "training/checkpointing.py",
        "read_metadata",
        "tracker_filename",
        ("release = metastring == 'release'", "sys.exit()"),
    ),
    _C(
        "choose_checkpoint",
        "training/checkpointing.py",
        "_load_base_checkpoint",
        holds=(
            "if maybe_msc.os.path.isfile(tracker_filename):\n",
            "iteration, release = read_metadata(tracker_filename)",
            "if getattr(args, 'ckpt_step', None):\n        iteration = args.ckpt_step\n",
            "if iteration == -1:\n",
            "get_checkpoint_name(load_dir, iteration, release, return_base_dir=True)",
        ),
    ),
    _C(
        "choose_checkpoint",
        "training/checkpointing.py",
        "load_checkpoint",
        holds=("if pretrained_dir is not None and (not checkpoint_exists(load_dir)):\n", "load_dir = pretrained_dir\n"),
    ),
    _C(
        "verify_others",
        "core/dist_checkpointing/serialization.py",
        "load",
        holds=("if verify_integrity:\n        verify_integrity_manifest(checkpoint_dir)\n",),
    ),
    _C("tensor_shapes", "core/dist_checkpointing/serialization.py", "load_tensors_metadata"),
    _C(
        "read_tensors",
        "core/dist_checkpointing/serialization.py",
        "load_plain_tensors",
        holds=("load(sharded_state_dict, checkpoint_dir, validate_access_integrity=False)",),
    ),
    _C(
        "build_on_one_process",
        "training/models/hybrid.py",
        "HybridModelBuilder.build_model",
        "self pg_collection pre_process post_process vp_stage",
    ),
    _C(
        "stored_tensors",
        "core/dist_checkpointing/mapping.py",
        "ShardedTensor",
        holds=("local_shape: Tuple", "global_offset: Tuple", "prepend_axis_num: int", "allow_shape_mismatch: bool"),
    ),
    _C("stored_tensors", "core/ssm/utils.py", "_split_tensor_factory", holds=("factory_sh_ten.narrow(split_dim,",)),
    _C(
        "save_weights",
        "training/checkpointing.py",
        "save_checkpoint",
        holds=("f.write('release' if release else str(iteration))",),
    ),
    _C(
        "save_weights",
        "training/checkpointing.py",
        "load_checkpoint",
        holds=("if args.finetune or release:\n", "not release and (not args.finetune or gpt_compat_load_optim)"),
    ),
    _C(
        "seal",
        "core/dist_checkpointing/validation.py",
        "save_integrity_manifest",
        "checkpoint_dir",
        ("json.dump(payload, f, indent=2)",),
    ),
    _C(
        "seal",
        "core/dist_checkpointing/serialization.py",
        "save",
        holds=(
            "save_integrity_manifest(checkpoint_dir)\n",
            "async_request.finalize_fns.append(metadata_finalize_fn)\n    if verify_integrity:\n"
            "        async_request.finalize_fns.append(integrity_finalize_fn)",
        ),
    ),
    _C("remove_old_checkpoints", "training/async_utils.py", "schedule_async_save", "async_request"),
    _C(
        "remove_old_checkpoints",
        "training/checkpointing.py",
        "save_checkpoint",
        holds=(
            # the pointer, then what is appended to the request, and all of it behind the manifest
            "async_save_request.add_finalize_fn(iter_finalize_fn)",
            "schedule_async_save(async_save_request)\n",
            "f.write('release' if release else str(iteration))",
            "ensure_directory_exists(checkpoint_name, check_parent=False)",
        ),
    ),
    _C("guard_save", TRAINING, holds=("load_checkpoint, save_checkpoint, save_grads\n",)),
    _C("explain_failure", TRAINING, "train", holds=("maybe_finalize_async_save(blocking=True, terminate=True)",)),
    _C(
        "_check_optimizer",
        "training/checkpointing.py",
        "generate_state_dict",
        holds=("if not args.no_save_optim:\n",),
    ),
    _C(
        "saving_flags",
        "training/checkpointing.py",
        "save_checkpoint",
        holds=("Don't use '--dist-ckpt-optim-fully-reshardable' when saving local checkpoints.",),
    ),
    _C(
        "saving_flags",
        "training/arguments.py",
        "validate_args",
        holds=("if not args.use_persistent_ckpt_worker:\n", "args.async_save = False\n"),
    ),
    _C(
        "save_from_a_copy_of_the_process",
        "training/async_utils.py",
        "_get_async_calls_queue",
        "",
        ("persistent=getattr(args, 'use_persistent_ckpt_worker', False)",),
    ),
    _C(
        "save_from_a_copy_of_the_process",
        "training/initialize.py",
        "initialize_megatron",
        holds=("if args.async_save and args.use_persistent_ckpt_worker:\n",),
    ),
    _C(
        "save_from_a_copy_of_the_process",
        ASYNC,
        "TemporalAsyncCaller.schedule_async_call",
        "self async_req",
        ("ctx = mp.get_context('fork')",),
    ),
    _C(
        "keep_vocabulary",
        "core/tokenizers/utils/build_tokenizer.py",
        "_set_padded_vocab_size",
        "args tokenizer",
        ("args.padded_vocab_size = vocab_size_with_padding(tokenizer.vocab_size, args)",),
    ),
    _C(
        "admit_known_classes_only",
        f"{DCP}/filesystem.py",
        "FileSystemReader.read_metadata",
        "self",
        ("metadata = pickle.load(metadata_file)\n", "metadata.storage_meta.load_id = self.load_id\n"),
    ),
    _C(
        "admit_known_classes_only",
        f"{DCP}/default_planner.py",
        "DefaultLoadPlanner.load_bytes",
        "self read_item value",
        (
            "self.original_state_dict, self.mappings[read_item.dest_index.fqn], torch.load(value, weights_only=False)",
            "self.state_dict[read_item.dest_index.fqn] = torch.load(value, weights_only=False)",
        ),
    ),
    _C(
        "admit_known_classes_only",
        "core/dist_checkpointing/strategies/common.py",
        "load_common",
        "checkpoint_dir",
        ("return maybe_msc.torch.load(load_path, map_location='cpu')",),
    ),
    _C(
        "admit_known_classes_only",
        "core/dist_checkpointing/serialization.py",
        "load_common_state_dict",
        holds=("return load_common(checkpoint_dir)\n",),
    ),
    _C(
        "admit_known_classes_only",
        "core/safe_globals.py",
        "SafeUnpickler",
        holds=("('torch.storage', '_load_from_bytes')", "if (module, name) not in self._SAFE_CLASSES:"),
    ),
    *(
        _C(
            "admit_known_classes_only",
            f"core/datasets/{name}_dataset.py",
            holds=("from megatron.core.safe_globals import safe_numpy_load\n", "allow_pickle=True, mmap_mode='r')"),
        )
        for name in ("gpt", "blended", "masked")
    ),
    _C("guard_save", TRAINING, "save_checkpoint_and_time", holds=("save_checkpoint(iteration,",)),
]
