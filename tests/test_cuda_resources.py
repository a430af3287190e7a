"""Reading what the compiler says of the CUDA kernels, and the table of it: docs/gpu/RESOURCES.md.

The exhaustive test compiles every kernel for the architecture that was measured and compares, where there is an nvcc.
All six take a quarter of an hour: `python scripts/cuda_resources.py`, after a change of a kernel.
"""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import cuda_resources  # noqa: E402

PTXAS = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z4copyPf' for 'sm_90'
ptxas info    : Function properties for _Z4copyPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 14 registers, used 1 barriers, 128 bytes smem, 380 bytes cmem[0]
ptxas info    : Compile time = 5.096 ms
ptxas info    : Compiling entry function '_Z5spillPf' for 'sm_90'
ptxas info    : Function properties for _Z5spillPf
    104 bytes stack frame, 16 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 64 registers, used 0 barriers, 104 bytes cumulative stack size
"""
MACHINE_CODE = """
	.section	.nv.info._Z4copyPf,"",@"SHT_CUDA_INFO"
	//----- nvinfo : EIATTR_MAX_THREADS
        /*0054*/ 	.byte	0x04, 0x05
        /*0058*/ 	.word	0x00000020
        /*005c*/ 	.word	0x00000004
        /*0060*/ 	.word	0x00000001
	//----- nvinfo : EIATTR_CRS_STACK_SIZE
        /*0068*/ 	.word	0x00000000
	.section	.text._Z4copyPf,"ax",@progbits
        /*01b0*/                   LDG.E.128.CONSTANT R8, desc[UR6][R2.64] ;
        /*01c0*/              @!P0 LDG.E R5, desc[UR6][R2.64] ;
        /*01e0*/              @P1  STG.E.128 desc[UR6][R4.64], R8 ;
        /*01f0*/                   LDS.128 R8, [R4] ;
        /*0200*/                   STS [R4], R8 ;
	.section	.text._Z5spillPf,"ax",@progbits
        /*0010*/                   STL.64 [R1], R2 ;
        /*0020*/                   LDL R2, [R1+0x4] ;
"""


def figures(registers=32, shared=0, stack=0, spilled=0, threads=256, **accesses):
    return cuda_resources.Figures(registers, shared, stack, spilled, threads, Counter(accesses))


def test_registers_shared_and_local_memory_are_read_from_ptxas():
    assert cuda_resources.parse_ptxas(PTXAS) == {
        "_Z4copyPf": figures(registers=14, shared=128, threads=0),
        "_Z5spillPf": figures(registers=64, stack=104, spilled=16 + 8, threads=0),
    }


def test_threads_and_wide_accesses_are_read_from_the_machine_code():
    assert cuda_resources.parse_machine_code(MACHINE_CODE) == {
        "_Z4copyPf": (128, Counter(LDG=1, STG=1, LDS=1)),
        "_Z5spillPf": (0, Counter(local=2)),
    }


@pytest.mark.parametrize(
    ("stores", "count"),
    [
        (["STG.E [R2.64], R8", "STG.E [R2.64+0x4], R9", "STG.E [R2.64+0xc], R9", "STG.E [R2.64+0x8], R9"], 1),
        (["STG.E [R2.64], R8", "STG.E [R2.64+0x4], R9", "STG.E [R2.64+0x8], R9"], 0),
        (["STG.E.64 desc[UR6][R2.64+-0x8], R8", "@P0 STG.E.64 desc[UR6][R2.64], R9"], 1),
        (["STG.E.64 desc[UR6][R2.64+0x8], R8", "STG.E.64 desc[UR6][R4.64], R9"], 0),
        (["STG.E.64 [R2.64+0x8], R8", "@P0 BRA `(.L_x_1)", "STG.E.64 [R2.64], R9"], 0),
        ([f"STG.E.U16 [R2.64+{2 * k:#x}], R{k}" for k in range(8)], 1),
        (["STG.E.128 [R2.64], R8", "STG.E.128 [R2.64+0x10], R8"], 0),
        (["STG.E.64 [R2.64+0x8], R8", "STG.E.64 [R2.64], R9", "STG.E.STRONG.SYS [R2.64+0x10], R9"], 0),
    ],
)
def test_a_wide_store_in_pieces_is_found_in_the_machine_code(stores, count):
    body = "".join(f"        /*{16 * i:04x}*/    {store} ;\n" for i, store in enumerate(stores))
    assert cuda_resources.stores_in_pieces(body) == count


def test_names_are_those_of_the_source():
    enums = cuda_resources.enumerators(["enum class Pass : int {  // why\n  kForward,\n  kBackward,  // last\n};"])
    assert enums == {"Pass": ["kForward", "kBackward"]}
    demangled = (
        "void charlm::cuda::(anonymous namespace)::rows<charlm::BFloat16, "
        "(charlm::cuda::(anonymous namespace)::Pass)1, true>(charlm::cuda::Rows<charlm::BFloat16>, int (*)(int))"
    )
    assert cuda_resources.short_name(demangled, enums) == "rows<BFloat16, kBackward, true>"


@pytest.mark.parametrize(
    ("kernel", "architecture", "percent"),
    [
        (figures(registers=32, threads=256), "8.0", 100),
        (figures(registers=33, threads=256), "8.0", 75),
        (figures(registers=64, threads=1024), "9.0", 50),
        (figures(registers=40, threads=1024), "8.6", 66),
        (figures(registers=16, threads=32), "8.0", 50),  # 32 blocks
        (figures(registers=16, threads=64, shared=48 << 10), "10.0", 12),
    ],
)
def test_occupancy_is_what_registers_blocks_and_shared_memory_leave(kernel, architecture, percent):
    assert cuda_resources.occupancy(kernel, architecture) == percent


def test_every_rule_that_a_kernel_breaks_is_said():
    good, bad = figures(LDG=1, STG=1), figures(threads=0, stack=8, spilled=12, LDG=1, pieces=4)
    assert cuda_resources.broken_rules({"op": {"good": {"8.0": good}, "bad": {"8.0": good, "9.0": bad}}}) == [
        "bad on 9.0 has no __launch_bounds__",
        "bad on 9.0 spills registers: 12 bytes",
        "bad on 9.0 uses local memory: 8 bytes",
        "bad on 9.0 has no STG of 128 bits",
        "bad on 9.0 stores 128 bits in pieces",
    ]


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("cross_entropy_packs<float, 4, 4, true, false>", ("LDG", "STG")),
        ("cross_entropy_forward<float, kPlain, 32>", ("LDG",)),
        ("cross_entropy_words<float, 2, 32, true, true>", ()),
        ("embedding_copy_rows<uint4, 4>", ("LDG", "STG")),
        ("embedding_copy_rows<unsigned int, 4>", ()),
        ("embedding_sum_chunks<BFloat16, 8>", ("LDG", "STG")),
        ("a_kernel_that_is_new<float>", ("LDG", "STG")),
    ],
)
def test_a_kernel_loads_and_stores_128_bits_unless_it_is_listed(name, kinds):
    assert cuda_resources.wide(name) == kinds


def table(**kernels):
    measured = {name: dict.fromkeys(cuda_resources.ARCHITECTURES, kernel) for name, kernel in kernels.items()}
    return cuda_resources.render({"op": measured}, "13.0")


def test_a_table_is_stale_after_more_than_a_step_of_registers():
    old = table(kernel=figures(registers=32, LDG=4))
    assert cuda_resources.stale_rows(old, old) == []
    assert cuda_resources.stale_rows(old, table(kernel=figures(registers=40, LDG=2))) == []
    stale = cuda_resources.stale_rows(old, table(kernel=figures(registers=41, LDG=4)))
    assert len(stale) == len(cuda_resources.ARCHITECTURES)
    assert "op: kernel, 8.0: 32 (100 %) in the file, now 41 (62 %)" in stale


def test_a_table_is_stale_where_kernels_threads_or_wide_accesses_changed():
    old = table(kernel=figures(LDG=4))
    assert cuda_resources.stale_rows(old, table(kernel=figures())) == [
        "op: kernel, global accesses: 4 / 0 in the file, now 0 / 0"
    ]
    assert cuda_resources.stale_rows(old, table(kernel=figures(LDG=4, threads=128)))[0].startswith(
        "op: kernel, threads: 256 in the file, now 128"
    )
    assert cuda_resources.stale_rows(old, table(kernel=figures(LDG=4), other=figures(LDG=4))) == [
        "op: other is not in the file"
    ]
    assert cuda_resources.stale_rows(old, table()) == ["op: kernel is in the file, but no kernel"]


def test_some_architectures_are_compared_by_registers_alone():
    old = table(kernel=figures(registers=32, LDG=4))
    measured = {"op": {"kernel": {"9.0": figures(registers=48, threads=128)}}}
    assert cuda_resources.stale_rows(old, cuda_resources.render(measured, "13.0")) == [
        "op: kernel, 9.0: 32 (100 %) in the file, now 48 (62 %)"
    ]


def test_the_committed_table_has_a_part_for_every_source():
    committed = cuda_resources.TABLES.read_text()
    assert {path.stem for path in cuda_resources.KERNELS.glob("*.cu")} == {
        row.partition(":")[0] for row in cuda_resources.read_tables(committed)
    }


@pytest.mark.exhaustive
def test_every_kernel_keeps_the_rules_and_its_figures():
    result = subprocess.run(
        [sys.executable, ROOT / "scripts" / "cuda_resources.py", "--check", "9.0"],
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode == cuda_resources.SKIPPED:
        pytest.skip(result.stdout.strip())
    assert result.returncode == 0, result.stdout + result.stderr
