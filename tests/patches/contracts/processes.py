"""Upstream code that is relied on for processes: their imports, start, signals and end."""

from tests.patches.contract import AGENT, ASYNC, ELASTIC, LOCAL_AGENT, PROCESSES, TRAINING, Contract

_C = Contract
CONTRACTS = [
    _C("postpone", "core/timers.py", holds=("try:\n    import wandb\n", "if writer == wandb")),
    _C("plain_functions", "core/jit.py", "enable_jit_fuser", "", ("jit_fuser = torch.compile\n",)),
    # torch's: the default grace that run_node replaces, and the places that _Agent overrides
    _C(
        "run_node",
        PROCESSES,
        "SubprocessContext._close",
        "self death_sig timeout",
        ("handler.proc.wait(time_to_wait)",),
    ),
    _C("run_node", PROCESSES, "PContext.close", "self death_sig timeout"),
    _C(
        "run_node",
        PROCESSES,
        "PContext",
        holds=("def close(self, death_sig: signal.Signals | None=None, timeout: int=30)",),
    ),
    _C(
        "run_node",
        PROCESSES,
        "PContext.start",
        holds=("'TORCHELASTIC_SIGNALS_TO_HANDLE'", "signals_to_handle.split(',')"),
    ),
    _C("run_node", PROCESSES, "SubprocessContext._poll", "self", ("self.close()\n",)),
    _C("run_node", PROCESSES, "LogsSpecs.reify", "self envs"),
    _C(
        "run_node",
        f"{ELASTIC}/multiprocessing/subprocess_handler/subprocess_handler.py",
        "SubprocessHandler._popen",
        "self args env",
        ("kwargs['start_new_session'] = True",),
    ),
    _C("run_node", LOCAL_AGENT, "LocalElasticAgent._shutdown", "self death_sig", ("self._pcontext.close(death_sig)",)),
    _C("run_node", LOCAL_AGENT, "LocalElasticAgent._stop_workers", "self worker_group", ("self._shutdown()",)),
    _C(
        "run_node",
        LOCAL_AGENT,
        "LocalElasticAgent._start_workers",
        "self worker_group",
        ("return self._pcontext.pids()",),
    ),
    _C("run_node", LOCAL_AGENT, "LocalElasticAgent._monitor_workers", "self worker_group", ("self._pcontext.wait(0)",)),
    _C(
        "run_node",
        AGENT,
        "SimpleElasticAgent._rendezvous",
        "self worker_group",
        ("worker_group.master_port = master_port\n", "self._store = store\n"),
    ),
    _C("run_node", AGENT, "SimpleElasticAgent._assign_worker_ranks", "self store group_rank group_world_size spec"),
    _C(
        "run_node",
        AGENT,
        "SimpleElasticAgent._invoke_run",
        holds=("if self._remaining_restarts > 0:\n", "self._remaining_restarts -= 1\n", "self._restart_workers("),
    ),
    _C(
        "run_node",
        AGENT,
        "SimpleElasticAgent.run",
        holds=("except SignalException as e:\n", "self._shutdown(e.sigval)"),
    ),
    _C(
        "run_node",
        f"{ELASTIC}/rendezvous/dynamic_rendezvous.py",
        "DynamicRendezvousHandler.next_rendezvous",
        holds=("if self._bootstrap_store_info is None:\n",),  # set once and for all restarts
    ),
    _C("state_of_the_run", TRAINING, "train", holds=("args.curr_iteration = iteration\n", "sys.exit(exit_code)")),
    _C(
        "result_validation_codes",
        "core/rerun_state_machine.py",
        holds=("EXIT_CODE_RESUME_TO_DISAMBIGUATE: int = 16", "EXIT_CODE_FAILED_ON_RESULT_VALIDATION: int = 17"),
    ),
    _C("signal_received", "training/dist_signal_handler.py", "DistributedSignalHandler.signals_received", "self"),
    _C(
        "signal_received",
        TRAINING,
        "checkpoint_and_decide_exit",
        holds=("if any(signal_handler.signals_received()):",),
    ),
    _C(
        "end_helpers",
        "training/datasets/data_samplers.py",
        "build_pretraining_data_loader",
        holds=("DistributedSignalHandler(args.exit_signal).__enter__()",),
    ),
    _C(
        "block_sigterm_in_children",
        "core/dist_checkpointing/strategies/filesystem_async.py",
        "get_write_results_queue",
        "mp_mode",
        ("mp_mode: str='spawn'", "ctx.Manager().Queue()"),
    ),
    _C(
        "block_sigterm_in_children",
        "core/dist_checkpointing/strategies/async_utils.py",
        "PersistentAsyncCaller._get_process",
        holds=("mp_mode: str='spawn'", "cls._persistent_process.start()"),
    ),
    _C(
        "end_helpers",
        ASYNC,
        "AsyncCallsQueue.close",
        "self abort",
        ("if self.persistent and AsyncCallsQueue._persistent_caller:\n",),
    ),
    _C("end_helpers", ASYNC, "PersistentAsyncCaller.close", "self abort", ("if abort:\n", "self.process.kill()")),
    _C(
        "spawn_the_worker",
        "training/initialize.py",
        "initialize_megatron",
        holds=("init_persistent_async_worker(args.rank, 'forkserver')",),
    ),
    _C(
        "spawn_the_worker",
        "training/async_utils.py",
        "init_persistent_async_worker",
        "rank mp_mode",
        ("warmup_kwargs['mp_mode'] = mp_mode", "get_write_results_queue(mp_mode='fork')"),
    ),
    _C(
        "spawn_the_worker",
        "core/dist_checkpointing/strategies/filesystem_async.py",
        "get_write_results_queue",
        "mp_mode",
        ("if _results_queue is None:",),
    ),
    _C(
        "notice_a_dead_worker",
        ASYNC,
        "PersistentAsyncCaller.is_current_async_call_done",
        "self blocking no_dist",
        ("self.cur_item = self._persistent_comp_q.get_nowait()", "if not blocking:", "sleep(0.1)"),
        ("self.process.is_alive()",),
    ),
]
