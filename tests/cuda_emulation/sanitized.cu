// A program for AddressSanitizer: every kernel on tensors that lie in heap blocks of exactly their size. Prints "ok" if
// all outputs are finite.
#include "attention_cuda.cuh"

extern "C" int sat_cuda_forward(const SatAttention*, int, void*);
extern "C" int sat_cuda_backward(const SatAttention*, int, void*);
extern "C" int sat_cuda_denominators(const SatAttention*, int, void*);
extern "C" int sat_cuda_statistics(const SatAttention*, int, void*);
extern "C" const char* sat_cuda_error(int);

namespace {

uint32_t state = 1;
float uniform() {    // in [-1, 1)
    state = state * 1664525 + 1013904223;
    return static_cast<float>(static_cast<int32_t>(state)) / 2147483648.0f;
}

struct Buffer {
    void* data = nullptr;
    int64_t count;
    int64_t type;

    Buffer(int64_t count, int64_t type, bool random) : count(count), type(type) {
        const size_t bytes = count * (type == 0 ? 4 : 2);
        if (posix_memalign(&data, 16, bytes)) abort();
        memset(data, 0xff, bytes);    // NaN: what is not written shows
        for (int64_t i = 0; random && i < count; ++i) {
            const float x = 2 * uniform();
            if (type == 0)
                static_cast<float*>(data)[i] = x;
            else
                static_cast<uint16_t*>(data)[i] =
                    static_cast<uint16_t>(type == 1 ? emulation::pack_bf16(x, 0) : emulation::pack_f16(x, 0));
        }
    }
    Buffer(const Buffer&) = delete;
    ~Buffer() { free(data); }
    bool finite() const {
        for (int64_t i = 0; i < count; ++i) {
            float x;
            if (type == 0)
                x = static_cast<float*>(data)[i];
            else if (type == 1)
                x = emulation::unpack_bf16(static_cast<uint16_t*>(data)[i]);
            else
                x = emulation::unpack_f16(static_cast<uint16_t*>(data)[i]);
            if (!(fabsf(x) < 1e6f)) return false;
        }
        return true;
    }
};

bool run(int64_t type, int64_t D, int64_t bs, int64_t nb, bool padded, bool dense) {
    const int64_t B = 2, H = 1, N = bs * nb, count = B * H * N * D;
    Buffer query(count, type, true), key(count, type, true), value(count, type, true), dout(count, type, true);
    Buffer out(count, type, false), dq(count, type, false), dk(count, type, false), dv(count, type, false);
    Buffer lse(B * H * N, 0, false), delta(B * H * N, 0, false);
    Buffer mean(B * N * N, 0, false), pooled(B * H * (N / 16) * (N / 16), 0, false);
    uint8_t* mask = static_cast<uint8_t*>(malloc(B * N));
    for (int64_t i = 0; i < B * N; ++i) mask[i] = uniform() < 0.5f;
    // Kept blocks: row 1 and column 1 empty.
    const bool causal = bs == 16;
    std::vector<int32_t> offsets{0}, list, column_offsets{0}, column_list;
    auto kept = [&](int64_t r, int64_t c) { return r != 1 && c != 1 && (!causal || c <= r) && (r * 7 + c * 3) % 4 != 0; };
    for (int64_t r = 0; r < nb; ++r) {
        for (int64_t c = 0; c < nb; ++c) {
            if (kept(r, c)) list.push_back(static_cast<int32_t>(c));
            if (kept(c, r)) column_list.push_back(static_cast<int32_t>(c));
        }
        offsets.push_back(static_cast<int32_t>(list.size()));
        column_offsets.push_back(static_cast<int32_t>(column_list.size()));
    }
    list.shrink_to_fit(), column_list.shrink_to_fit(), offsets.shrink_to_fit(), column_offsets.shrink_to_fit();
    SatAttention p{};
    const std::pair<SatTensor*, const Buffer*> tensors[] = {{&p.query, &query}, {&p.key, &key}, {&p.value, &value},
                                                            {&p.out, &out},     {&p.dout, &dout}, {&p.dq, &dq},
                                                            {&p.dk, &dk},       {&p.dv, &dv}};
    for (auto [tensor, buffer] : tensors) *tensor = {buffer->data, {H * N * D, N * D, D}};
    p.lse = static_cast<float*>(lse.data);
    p.delta = static_cast<float*>(delta.data);
    p.mean = static_cast<float*>(mean.data);
    p.pooled = static_cast<float*>(pooled.data);
    p.key_padding_mask = padded ? mask : nullptr;
    p.mask_strides[0] = N;
    p.mask_strides[1] = 1;
    if (!dense) {
        p.row_offsets = offsets.data();
        p.row_columns = list.data();
        p.column_offsets = column_offsets.data();
        p.column_rows = column_list.data();
    }
    p.batch = p.groups = B;
    p.heads = H;
    p.length = N;
    p.head_dim = D;
    p.block_size = bs;
    p.type = type;
    p.pruned_zero = !dense;
    p.causal = causal;
    p.scale = 0.125;
    p.mean_factor = 0.5;
    int status = sat_cuda_forward(&p, 0, nullptr);
    if (!status) status = sat_cuda_backward(&p, 0, nullptr);
    bool good = out.finite() && dq.finite() && dk.finite() && dv.finite() && delta.finite();
    p.causal = p.pruned_zero = 0;
    p.row_offsets = p.row_columns = nullptr;
    emulation::machine.multiprocessors = padded ? 132 : 0;    // which decides how large tiles are
    if (!status) status = sat_cuda_denominators(&p, 0, nullptr);
    if (!status) status = sat_cuda_statistics(&p, 0, nullptr);
    good = good && mean.finite() && pooled.finite();
    free(mask);
    if (status || !good)
        printf("type %d D %d bs %d: %s\n", int(type), int(D), int(bs), status ? sat_cuda_error(status) : "not finite");
    return !status && good;
}

}    // namespace

int main() {
    bool good = true;
    for (int64_t type : {0, 1, 2})
        for (int64_t D : {32, 64, 128})
            for (int64_t bs : {16, 32, 64})
                good &= run(type, D, bs, bs == 64 ? 2 : 3, bs != 32, bs == 32 && D == 64);
    puts(good ? "ok" : "failed");
    return !good;
}
