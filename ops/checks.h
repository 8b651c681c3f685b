// What every implementation of an operator demands of its arguments, whatever the device.
#pragma once

#include <ATen/ATen.h>

#include <initializer_list>
#include <string>

#include "ops/ops.h"

namespace spot::ops {

// A key norm's word in a schema; throws on others.
KeyPreparation::Norm parse_key_norm(const std::string& word);
const char* key_norm_name(KeyPreparation::Norm norm);

void check_rows(const char* op, const at::Tensor& page_table, const at::Tensor& lengths, int64_t rows);
void check_devices(const char* op, const at::Tensor& first, std::initializer_list<const at::Tensor*> others);
void check_append(const at::Tensor& pool, const at::Tensor& slots, const at::Tensor& keys,
                  const std::string& format);
void check_preparation(const at::Tensor& keys, const KeyPreparation& preparation);
void check_gather(const at::Tensor& pool, const at::Tensor& page_table, int64_t length,
                  const std::string& format);
void check_score(const at::Tensor& query, const at::Tensor& weight, const at::Tensor& pool,
                 const at::Tensor& page_table, const at::Tensor& lengths, const std::string& format);
void check_select(const at::Tensor& scores, const at::Tensor& lengths, bool top_p, double p,
                  double temperature);
void check_attention(const at::Tensor& query, const at::Tensor& key_pool, const at::Tensor& value_pool,
                     const at::Tensor& page_table, const at::Tensor& lengths, const at::Tensor& indices,
                     const at::Tensor& counts);

}  // namespace spot::ops
