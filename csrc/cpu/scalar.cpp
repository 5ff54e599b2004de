// Any processor.
#include "rows.h"

const Isa mkp_isa_scalar = {rows_linear, rows_dequantize, rows_signs, rows_signs_transposed};
