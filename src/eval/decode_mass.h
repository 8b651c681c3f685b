// The true attention mass that decode steps' selections hold, added up by an observer of SparseAttention.
#pragma once

#include "attention/mass.h"
#include "attention/sparse.h"

namespace spot {

struct DecodeMass {
  double captured = 0;  // summed over sparse layers, steps and sequences; averaged over groups
  int64_t terms = 0;

  void operator()(const SelectionEvent& event) {
    for (int64_t i = 0; i < event.inputs.batch.num_sequences(); ++i) {
      const int64_t position = event.inputs.batch.starts[i];
      const Selection row = event.selection.row(i);
      const at::Tensor key = sequence_tokens(event.keys, event.inputs.batch, i, position + 1);
      const at::Tensor mass = attention_mass(event.inputs.query.narrow(0, i, 1), key, event.inputs.scale,
                                             position, row.groups(), mass_reduction(row));
      captured += captured_mass(mass, row, event.rule).total.mean().item<double>();
      terms += 1;
    }
  }
};

}  // namespace spot
