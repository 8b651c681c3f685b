// The true attention mass that a decode row's selection holds.
#pragma once

#include "attention/mass.h"
#include "attention/sparse.h"

namespace spot {

// Of row `row` of an event of decode rows; averaged over groups.
inline double captured_by_row(const SelectionEvent& event, int64_t row) {
  const int64_t position = event.inputs.batch.starts[static_cast<size_t>(row)];
  const Selection selection = event.selection.row(row);
  const at::Tensor key = sequence_tokens(event.keys, event.inputs.batch, row, position + 1);
  const at::Tensor mass = attention_mass(event.inputs.query.narrow(0, row, 1), key, event.inputs.scale,
                                         position, selection.groups(), mass_reduction(selection));
  return captured_mass(mass, selection, event.rule).total.mean().item<double>();
}

}  // namespace spot
