"""A hardware profile as the TOML file that `memory/hardware/profiles.py` reads."""

from __future__ import annotations

import json

from memory.hardware.profiles import GIB, HardwareProfile


def profile_toml(p: HardwareProfile) -> str:
    """A machine as a file that `load_profile` reads; what models may not use of it is left out."""
    lines = [f"name = {_quoted(p.name)}", f"description = {_quoted(p.description)}", "", "[cpu]"]
    lines += [f"cores = {p.cores}", f"level = {_quoted(p.cpu_level)}"]
    lines += [f"matmul_gflops = {p.cpu_matmul_flops / 1e9:.9g}"]
    if p.expert_bytes_per_s is not None:
        lines += [f"expert_gb_per_s = {p.expert_bytes_per_s / 1e9:.9g}"]
    if p.cpu_fp8_flops is not None:
        lines += [f"fp8_gflops = {p.cpu_fp8_flops / 1e9:.9g}"]
    if p.rearranged_per_core is not None:
        lines += [f"rearranged_gb_per_s = {p.rearranged_per_core / 1e9:.9g}"]
    lines += ["", "[dram]", f"size_gib = {p.dram_bytes / GIB!r}"]
    lines += [
        f"read_gb_per_s = {p.dram_bytes_per_s / 1e9:.9g}",
        f"random_rows_per_s = {p.dram_rows_per_s:.9g}",
    ]
    lines += ["", "[disk]", f"free_gb = {p.disk_bytes / 1e9:.9g}"]
    lines += [f"read_gb_per_s = {p.disk_bytes_per_s / 1e9:.9g}"]
    lines += [f"random_reads_per_s = {p.disk_reads_per_s:.9g}"]
    for gpu in p.gpus:
        lines += ["", "[[gpu]]", f"name = {_quoted(gpu.name)}", f"memory_gib = {gpu.memory_bytes / GIB!r}"]
        lines += [f"memory_gb_per_s = {gpu.memory_bytes_per_s / 1e9:.9g}"]
        lines += [f"matmul_tflops = {gpu.matmul_flops / 1e12:.9g}"]
        lines += [f"link_gb_per_s = {gpu.link_bytes_per_s / 1e9:.9g}"]
        lines += [f"link_together_gb_per_s = {gpu.link_together_bytes_per_s / 1e9:.9g}"]
    if p.costs is not None:
        lines += ["", "[costs]", f"price = {p.costs.price:.2f}", f"idle_watts = {p.costs.idle_watts:.9g}"]
        lines += [f"busy_watts = {p.costs.busy_watts:.9g}", f"currency = {_quoted(p.costs.currency)}"]
        lines += [f"source = {_quoted(p.costs.source)}"]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    """A string of TOML, which knows no pairs of surrogates and refuses a bare DEL."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
