// Which lane of a warp holds what of a 16 x 16 operand: the tables of PTX's `ldmatrix` (.x4) and
// `mma.m16n8k16`, in the terms of this kernel. The device asks for addresses and writes sums by
// them; block_host.h plays both instructions by them, so that a wrong table gives wrong numbers
// on a CPU too.

#pragma once

#include "numbers.h"

namespace mla_decode
{

struct Place
{
    int row;
    int column;
};

// Where the address that a lane gives to ldmatrix points. Left operand: rows are query rows.
MLA_FN Place left_address(int lane)
{
    return Place{lane % 16, 8 * (lane / 16)};
}

// Right operand of scores, from rows that are tokens: its columns are tokens. Not transposed.
MLA_FN Place keys_address(int lane)
{
    return Place{lane % 8 + 8 * (lane / 16), 8 * ((lane / 8) % 2)};
}

// Right operand of outputs, from rows that are tokens: its rows are tokens. Transposed.
MLA_FN Place values_address(int lane)
{
    return Place{lane % 8 + 8 * ((lane / 8) % 2), 8 * (lane / 16)};
}

// First of the two columns that register `part` of a lane holds of the left operand.
MLA_FN Place left_pair(int lane, int part)
{
    return Place{lane / 4 + 8 * (part % 2), 2 * (lane % 4) + 8 * (part / 2)};
}

// First of the two columns of sums 2 * pair and 2 * pair + 1 of a 16 x 8 half.
MLA_FN Place sum_pair(int lane, int half, int pair)
{
    return Place{lane / 4 + 8 * pair, 2 * (lane % 4) + 8 * half};
}

} // namespace mla_decode
