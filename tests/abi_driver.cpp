// Runs attention through the C ABI on inputs from a file, without Python: for processors that are emulated here.
//   usage: abi_driver INPUTS OUTPUTS; the order of both as in tests/test_other_processors.py

#include <stdio.h>
#include <vector>

#include "abi.h"

extern "C" int sat_attention_forward(const SatAttention*);
extern "C" int sat_attention_backward(const SatAttention*);
extern "C" int sat_attention_statistics(const SatStatistics*);

static FILE *inputs, *outputs;

template <class T>
static std::vector<T> read(size_t count) {
    std::vector<T> values(count);
    if (fread(values.data(), sizeof(T), count, inputs) != count) throw "too few inputs";
    return values;
}

template <class T>
static void write(const std::vector<T>& values) {
    fwrite(values.data(), sizeof(T), values.size(), outputs);
}

int main(int, char** arguments) {
    inputs = fopen(arguments[1], "rb"), outputs = fopen(arguments[2], "wb");
    const auto shape = read<int64_t>(8);
    const float scale = read<float>(1)[0];
    const int64_t B = shape[0], H = shape[1], N = shape[2], d = shape[3], bs = shape[4], nnz = shape[5], nb = N / bs;
    const size_t bytes = B * H * N * d * (shape[7] == SAT_FLOAT32 ? 4 : 2);
    std::vector<std::vector<char>> tensors;    // query, key, value, dout, then out, dquery, dkey, dvalue
    for (int i = 0; i < 8; ++i) tensors.push_back(i < 4 ? read<char>(bytes) : std::vector<char>(bytes));
    const auto real = read<uint8_t>(B * N);
    const auto row_offsets = read<int32_t>(nb + 1), row_columns = read<int32_t>(nnz);
    const auto column_offsets = read<int32_t>(nb + 1), column_rows = read<int32_t>(nnz);
    std::vector<float> lse(B * H * N), mean(N * N);
    std::vector<double> pooled_sum(nb * nb), square_sum(nb);
    const auto tensor = [&](int i) { return SatTensor{tensors[i].data(), H * N * d, N * d, d, 1}; };

    SatAttention call{};
    call.query = tensor(0), call.key = tensor(1), call.value = tensor(2), call.dout = tensor(3);
    call.out = tensor(4), call.dquery = tensor(5), call.dkey = tensor(6), call.dvalue = tensor(7);
    call.lse = lse.data(), call.real = real.data();
    call.row_offsets = row_offsets.data(), call.row_columns = row_columns.data();
    call.column_offsets = column_offsets.data(), call.column_rows = column_rows.data();
    call.B = B, call.H = H, call.N = N, call.d = d, call.bs = bs;
    call.layouts = 1, call.pruned_zero = shape[6], call.type = shape[7], call.threads = 2, call.scale = scale;
    if (sat_attention_forward(&call) || sat_attention_backward(&call)) return 1;

    SatStatistics statistics{};
    statistics.query = call.query, statistics.key = call.key, statistics.real = call.real;
    statistics.mean = mean.data(), statistics.pooled_sum = pooled_sum.data(), statistics.square_sum = square_sum.data();
    statistics.B = B, statistics.H = H, statistics.N = N, statistics.d = d, statistics.bs = bs, statistics.groups = 1;
    statistics.type = call.type, statistics.threads = 2, statistics.scale = scale, statistics.weight = 1;
    if (sat_attention_statistics(&statistics)) return 1;

    for (int i = 4; i < 8; ++i) write(tensors[i]);
    write(lse), write(mean), write(pooled_sum), write(square_sum);
    return fclose(outputs);
}
