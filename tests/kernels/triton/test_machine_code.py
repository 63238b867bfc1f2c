"""The search for overwritten operands of products, on machine code written by hand."""

import pytest

from tests.support.machine_code import overwritten

LOOP = """
        /*0010*/                   LDSM.16.M88.4 R100, [R6+UR16] ;
.L_x_1:
        /*0020*/                   HGMMA.64x64x16.F32.BF16 R24, R100, gdesc[UR40], RZ, !UPT, gsb0 ;
        /*0030*/                   MUFU.EX2 R90, R24 ;
        /*0040*/                   F2FP.BF16.F32.PACK_AB {weights}, R91, R90 ;
        /*0050*/                   HGMMA.64x64x16.F32.BF16 R56, {left}, gdesc[UR40].tnspB, R56, gsb0 ;
        /*0070*/               @P0 BRA `(.L_x_1) ;
        /*0080*/                   EXIT ;
"""


@pytest.mark.parametrize(
    ("weights", "left", "wrong"),
    [("R100", "R100", 1), ("R103", "R100", 1), ("R104", "R104", 0)],  # the first of four registers, the last, another
)
def test_a_left_side_written_before_a_loop_and_in_it(weights, left, wrong):
    found = overwritten(LOOP.format(weights=weights, left=left))
    assert len(found) == wrong
    assert all("R24, R100" in product for product in found)
