"""Faults of what reads and writes: bundles, locks, checkpoints, images, evaluations, errors and exit codes."""

from __future__ import annotations

from tests.mutants.table import faults

_BUNDLE = "evit_deploy/bundle"
_CHECKPOINT = "evit_deploy/checkpoint"
_EVALUATION = "evit_deploy/evaluation"

FILE_FAULTS = (
    *faults(
        "bundle read",
        f"{_BUNDLE}/reader.py",
        "tests/test_bundle.py",
        {
            "only the graph's hash checked": (
                "            if check_hash:\n",
                '            if check_hash and record.name == "model.onnx":\n',
            ),
            "a longer file accepted": ("if status.st_size > record.size_bytes:", "if status.st_size < 0:"),
            "a link followed": (
                "        if not is_link:\n            return os.open(name, os.O_RDONLY | os.O_NOFOLLOW |",
                "        if True:\n            return os.open(name, os.O_RDONLY |",
            ),
            "weights replaced after opening accepted": (
                "if now != self._identities[name]:",
                "if now is None:",
            ),
        },
    ),
    *faults(
        "bundle read",
        f"{_BUNDLE}/reader.py",
        "tests/test_bundle.py",
        {"a graph changed after opening accepted": ("if digest != self.onnx_sha256:", "if not data:")},
    ),
    *faults(
        "manifest",
        f"{_BUNDLE}/manifest.py",
        "tests/test_bundle.py",
        {
            "a path that leads out accepted": ("for part in parts)", "for part in parts[1:])"),
            "its own hash not compared": ("if digest != manifest.get(HASH_FIELD):", "if HASH_FIELD not in manifest:"),
            "its own hash of all but one field": ("if key != HASH_FIELD}", 'if key not in (HASH_FIELD, "onnx")}'),
            "a newer version read": ("if version > MANIFEST_SCHEMA_VERSION:", "if version > 99:"),
        },
    ),
    *faults(
        "bundle write",
        f"{_BUNDLE}/writer.py",
        "tests/test_bundle_writer.py",
        {
            "lock not taken": ("            self._lock.acquire()\n", "            self._lock.path.touch()\n"),
            "staging left behind": (
                "                shutil.rmtree(self._staging, ignore_errors=True)\n",
                "                pass\n",
            ),
            "replaced without force": (
                "        if not self.force:\n",
                "        if not self.force and self.target.is_file():\n",
            ),
            "a folder with foreign files replaced": (
                'belongs to no bundle" if foreign else None',
                'belongs to no bundle" if len(foreign) > 9 else None',
            ),
            "a killed writer's staging kept": ('self._leftovers("staging")', 'self._leftovers("stage")'),
            "old bundle not put back after a kill": (
                "                os.rename(aside, self.target)\n",
                "                shutil.rmtree(aside, ignore_errors=True)\n",
            ),
            "a living writer's staging removed": (
                "                alive = not try_flock(descriptor)\n",
                "                alive = try_flock(descriptor) and False\n",
            ),
            "old bundle removed before the new one is there": (
                "        if atomic.exchange(self.path, self.target):\n",
                "        shutil.rmtree(self.target)\n"
                "        self._progress('old bundle removed')\n"
                "        os.rename(self.path, self.target)\n        if True:\n",
            ),
            "a folder that appears before the move replaced": (
                "        self._refuse_occupied_target()  # again",
                "        pass  # again",
            ),
        },
    ),
    *faults(
        "bundle write",
        f"{_BUNDLE}/writer.py",
        "tests/test_bundle_writer.py",
        {
            "files not flushed before the move": ("atomic.sync_tree(self.path)", "atomic.sync_path(self.path)"),
            "a folder that appears at the last moment replaced": (
                "            try:\n                atomic.rename_to_new(self.path, self.target)\n",
                "            try:\n                os.replace(self.path, self.target)\n",
            ),
        },
        "flushed or appears",
    ),
    *faults(
        "file lock",
        f"{_BUNDLE}/filelock.py",
        "tests/test_filelock.py",
        {
            "shared": ("fcntl.LOCK_EX | fcntl.LOCK_NB", "fcntl.LOCK_SH | fcntl.LOCK_NB"),
            "a file without a name locked": (
                "if _is_named(self.path, descriptor):\n                    self._descriptor",
                "if descriptor >= 0:\n                    self._descriptor",
            ),
        },
    ),
    *faults(
        "checkpoint",
        f"{_CHECKPOINT}/file.py",
        "tests/test_checkpoint_file.py",
        {
            "code in a pickle is run": (
                'map_location="cpu", weights_only=True',
                'map_location="cpu", weights_only=False',
            ),
            "checksums not compared": ("if entry.CRC == 0:", "if entry.CRC:"),
        },
    ),
    *faults(
        "checkpoint",
        f"{_CHECKPOINT}/match.py",
        "tests/test_checkpoint_match.py",
        {
            "unused weights tolerated": (
                "unused=(*named.unknown, *(named.file_names[n] for n in found if n not in expected)),",
                "unused=named.unknown,",
            ),
            "weights that no rule knows tolerated": ("unused=(*named.unknown, *(", "unused=(*named.unknown[:0], *("),
        },
        "surplus",
    ),
    *faults(
        "checkpoint",
        f"{_CHECKPOINT}/spec.py",
        "tests/test_checkpoint_spec.py",
        {
            "eps of timm for MIT's weights": ('{"mit": 1e-15, "timm": 1e-5}', '{"mit": 1e-5, "timm": 1e-5}'),
        },
    ),
    *faults(
        "checkpoint",
        f"{_CHECKPOINT}/weights.py",
        "tests/test_checkpoint.py",
        {
            "trained weights before their average": (
                "for wrapper in (*_EMA_WRAPPERS, *_MODEL_WRAPPERS):",
                "for wrapper in (*_MODEL_WRAPPERS, *_EMA_WRAPPERS):",
            ),
        },
    ),
    *faults(
        "checkpoint",
        f"{_CHECKPOINT}/weights.py",
        "tests/test_checkpoint_match.py",
        {
            "infinite weights accepted": (
                "if not torch.isfinite(converted.sum()) and not torch.isfinite(converted).all():",
                "if torch.isnan(converted).any():",
            ),
        },
    ),
    *faults(
        "checkpoint",
        f"{_CHECKPOINT}/spec.py",
        "tests/test_checkpoint.py",
        {
            "eps of large models in small ones": (
                'variant.startswith("l"))',
                'variant.startswith("b"))',
            ),
        },
    ),
    *faults(
        "key names",
        f"{_CHECKPOINT}/key_formats.py",
        "tests/test_key_formats.py",
        {
            "one key of a family is enough": (
                "if 2 * _matches(best, names) < len(names) or not names:",
                "if not _matches(best, names):",
            ),
            "Microsoft's blocks off by one": ('blocks.{{}}.", shift=-3)', 'blocks.{{}}.", shift=-2)'),
        },
    ),
    *faults(
        "images",
        "evit_deploy/images/decode.py",
        "tests/test_images.py",
        {
            "channels in the file's order": (
                'if preprocessing.channel_order == "BGR":',
                'if preprocessing.channel_order == "bgr":',
            ),
            "mean of pixels not scaled": (
                "(pixels.astype(np.float32) / np.float32(255.0) - mean) / std",
                "(pixels.astype(np.float32) - mean) / np.float32(255.0) / std",
            ),
        },
    ),
    *faults(
        "images",
        "evit_deploy/images/sources.py",
        "tests/test_images.py",
        {
            "unreadable files skipped": ("        if unreadable:\n", "        if unreadable and not labels:\n"),
            "NaN in an array accepted": ("if not np.isfinite(image).all():", "if np.isinf(image).any():"),
        },
    ),
    *faults(
        "evaluate",
        f"{_EVALUATION}/answers.py",
        "tests/test_evaluation_state.py",
        {"NaN in one class is an answer": ("np.isfinite(logits).all(axis=1)", "np.isfinite(logits).any(axis=1)")},
    ),
    *faults(
        "evaluate state",
        f"{_EVALUATION}/state.py",
        "tests/test_evaluation_state.py",
        {
            "lock not taken": ("if not try_flock(file.fileno()):", "if file.closed:"),
            "classes that the model lacks accepted": (
                "_all_between(row, 0, self.classes)",
                "_all_between(row, 0, 9999)",
            ),
        },
    ),
    *faults(
        "evaluate",
        f"{_EVALUATION}/run.py",
        "tests/test_evaluate.py",
        {
            "gate of the drop ten times too wide": (
                "100 * lost > allowed * len(read)",
                "100 * lost > 10 * allowed * len(read)",
            ),
            "NaN does not fail": ("    if no_answer:\n", "    if no_answer == len(read):\n"),
        },
        "gate_is_exact or no_answer_and_fails or batch_size_changes",
    ),
    *faults(
        "environment",
        "evit_deploy/environment.py",
        "tests/test_environment.py",
        {
            "AVX-512 taken for BF16": ('"bf16": ("avx512_bf16",', '"bf16": ("avx512f",'),
            "GPUs of an nvidia-smi that failed": ("if done.returncode != 0:", "if done.returncode < 0:"),
        },
    ),
    *faults(
        "errors",
        "evit_deploy/errors.py",
        "tests/test_cli_errors.py",
        {"a parity failure is exit code 1": ("    exit_code = EXIT_PARITY\n", "    exit_code = EXIT_FAILED\n")},
        "not a_signal",
    ),
    *faults(
        "command line",
        "evit_deploy/cli/__init__.py",
        "tests/test_cli_errors.py",
        {
            "out of memory is exit code 1": ("        return EXIT_LIMIT\n", "        return EXIT_FAILED\n"),
        },
        "not a_signal",
    ),
    *faults(
        "doctor",
        "evit_deploy/doctor.py",
        "tests/test_doctor.py",
        {
            "a missing part is no verdict": (
                "if row.required and row.status == MISSING]",
                "if row.required and row.status == WARNING]",
            ),
        },
    ),
)
