// Drives slimwright/kernels/packed_step.cpp and attend.cpp with random decoders in buffers of exactly their size, and with
// damaged descriptions of them. Right steps must give the same bits on one thread and on three, damaged ones an error.
// Built with AddressSanitizer by test_fuzz.py; runs under an emulator for other processors. fuzz_step ROUNDS SEED

#include "../../slimwright/kernels/packed_step.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

using namespace slimwright;

extern "C" {
const char* slimwright_packed_isa();
int slimwright_packed_bfloats();
int slimwright_packed_check(const Weight*);
int slimwright_packed_step(const SlimwrightStep*);
int slimwright_kv_append(SlimwrightKv*, const void*, const void*, int64_t);
const SlimwrightKvParts* slimwright_kv_parts();
}

static std::mt19937_64 random_bits;
static int64_t below(int64_t n) { return int64_t(random_bits() % uint64_t(n)); }
static float uniform() { return float(random_bits() >> 40) / float(1 << 23) - 1; }

// Heap blocks of exactly their size, kept until the end of a round.
struct Heap {
    std::vector<std::unique_ptr<uint8_t[]>> blocks;
    uint8_t* bytes(int64_t n) {
        blocks.emplace_back(new uint8_t[size_t(n)]);
        for (int64_t i = 0; i < n; i++) blocks.back()[size_t(i)] = uint8_t(random_bits());
        return blocks.back().get();
    }
    float* floats(int64_t n) {
        float* data = reinterpret_cast<float*>(bytes(n * 4));
        for (int64_t i = 0; i < n; i++) data[i] = uniform();
        return data;
    }
};

static SlimwrightProduct product(Heap& heap, int64_t rows, int64_t columns, int64_t type) {
    Weight* w = reinterpret_cast<Weight*>(heap.bytes(sizeof(Weight)));
    memset(w, 0, sizeof(Weight));
    w->rows = rows, w->columns = columns, w->kind = INT, w->bits = int32_t(2 + below(7));
    const int64_t groups[] = {16, 32, 48, 64, 128, columns, 20};
    w->group = groups[below(7)];
    if (w->group > columns) w->group = columns;
    w->zero_kind = int32_t(below(4));
    const int64_t count = rows * groups_of(*w);
    w->payload_bytes = rows * ((columns + 7) / 8 * w->bits);
    w->payload = heap.bytes(w->payload_bytes);
    const auto halves = [&](int64_t n) {  // of ordinary size
        uint8_t* data = heap.bytes(n * 2);
        for (int64_t i = 0; i < n; i++) data[2 * i + 1] = uint8_t(0x20 + (data[2 * i + 1] & 3));
        return data;
    };
    w->scale_bytes = count * 2, w->scale = halves(count);
    if (w->zero_kind == BYTES) w->zero = heap.bytes(w->zero_bytes = count);
    if (w->zero_kind == NIBBLES) w->zero = heap.bytes(w->zero_bytes = rows * ((groups_of(*w) + 1) / 2));
    if (w->zero_kind == HALVES) w->zero = halves(count), w->zero_bytes = count * 2;
    const bool integers = w->group >= columns || w->group % BLOCK == 0;
    int64_t digits = integers ? below(4) : 0;
    if (type == BFLOAT16 && slimwright_packed_bfloats() && below(3) == 0) digits = BFLOATS;
    return {w, below(2) ? heap.floats(rows) : nullptr, digits};
}

// A cache with some tokens in it: of a sliding window too, where nothing is packed.
// There is room for `more` new ones.
static SlimwrightKv* cache(Heap& heap, int64_t batch, int64_t more, int64_t heads, int64_t kv_heads, int64_t dim,
                           int64_t type) {
    SlimwrightKv* kv = reinterpret_cast<SlimwrightKv*>(heap.bytes(sizeof(SlimwrightKv)));
    memset(kv, 0, sizeof(SlimwrightKv));
    const int64_t element = type == FLOAT32 ? 4 : 2, kinds[] = {16, 2, 4, 8};
    kv->batch = batch, kv->heads = heads, kv->kv_heads = kv_heads, kv->key_dim = kv->value_dim = dim;
    kv->bits = more > 1 ? 16 : kinds[below(4)], kv->dtype = type, kv->threads = 1, kv->scaling = 0.3f, kv->group = 32;
    const int64_t tokens = 1 + below(below(2) ? 70 : 600);
    kv->window = kv->bits < 16 ? 32 : tokens + more;
    if (kv->bits == 16 && more == 1 && below(3) == 0) kv->window = kv->sliding = 1 + below(tokens + 1);
    kv->key_window = heap.bytes(batch * kv_heads * kv->window * dim * element);
    kv->value_window = heap.bytes(batch * kv_heads * kv->window * dim * element);
    if (kv->bits < 16) {
        kv->key_capacity = (tokens / 32) * 32, kv->value_capacity = tokens > 31 ? tokens - 31 : 0;
        const int64_t rows = batch * kv_heads, tile = 4 * kv->bits, tiles = (dim + 31) / 32;
        const auto halves = [&](int64_t n) { return reinterpret_cast<uint16_t*>(heap.bytes(n * 2)); };
        if (kv->key_capacity) {
            kv->key_codes = heap.bytes(rows * kv->key_capacity / 32 * dim * tile);
            kv->key_scale = halves(rows * kv->key_capacity / 32 * dim), kv->key_low = halves(rows * kv->key_capacity / 32 * dim);
        }
        if (kv->value_capacity) {
            kv->value_codes = heap.bytes(rows * kv->value_capacity * tiles * tile);
            kv->value_scale = halves(rows * kv->value_capacity * tiles), kv->value_low = halves(rows * kv->value_capacity * tiles);
        }
    }
    const int64_t count = batch * kv_heads * tokens * dim;
    std::vector<uint8_t> states(size_t(count * element), 0);
    for (int64_t i = 0; i < count; i++) {
        const float x = uniform();
        memcpy(states.data() + i * element, reinterpret_cast<const uint8_t*>(&x) + (4 - element), size_t(element));
    }
    if (slimwright_kv_append(kv, states.data(), states.data(), tokens)) {
        printf("FAILED: tokens were not appended\n");
        exit(1);
    }
    return kv;
}

static void one() {
    Heap heap;
    const int64_t type = below(2), batch = 1 + below(5), kv_heads = 1 + below(2), group = 1 + below(3), heads = kv_heads * group;
    const int64_t dim = 8 * (1 + below(6)), width = 8 + below(90), inner = 8 + below(150), layers = below(3);
    const bool apart = below(3) > 0;  // texts have caches of their own, each with some of the rows
    std::vector<int64_t> tokens;
    for (int64_t left = batch; apart && left > 0; left -= tokens.back()) tokens.push_back(1 + below(below(2) ? 1 : left));
    const int64_t caches = apart ? int64_t(tokens.size()) : 1;
    std::vector<SlimwrightLayer> blocks;
    std::vector<SlimwrightKv*> all;
    for (int64_t i = 0; i < layers; i++) {
        SlimwrightLayer layer{};
        layer.q = product(heap, heads * dim, width, type), layer.k = product(heap, kv_heads * dim, width, type);
        layer.v = product(heap, kv_heads * dim, width, type), layer.o = product(heap, width, heads * dim, type);
        layer.gate = product(heap, inner, width, type), layer.up = product(heap, inner, width, type);
        layer.down = product(heap, width, inner, type);
        layer.input_gain = heap.floats(width), layer.middle_gain = heap.floats(width);
        if (below(2)) layer.q_gain = heap.floats(dim), layer.k_gain = heap.floats(dim);
        SlimwrightKv** kvs = reinterpret_cast<SlimwrightKv**>(heap.bytes(caches * int64_t(sizeof(SlimwrightKv*))));
        for (int64_t c = 0; c < caches; c++)
            all.push_back(kvs[c] = cache(heap, apart ? 1 : batch, apart ? tokens[size_t(c)] : 1, heads, kv_heads, dim, type));
        layer.kv = kvs;
        blocks.push_back(layer);
    }
    SlimwrightStep step{};
    step.batch = batch, step.width = width, step.layers = layers, step.caches = caches;
    step.tokens = apart ? tokens.data() : nullptr;
    std::vector<int64_t> rows;
    for (int64_t row = 0; row < batch; row++) if (below(2) || (row == batch - 1 && rows.empty())) rows.push_back(row);
    const bool some = below(2);
    step.outputs = some ? int64_t(rows.size()) : batch, step.output = some ? rows.data() : nullptr;
    step.rotary = below(2) ? dim : dim / 2;
    step.positions = below(2) ? 1 : batch, step.type = type, step.epsilon = step.head_epsilon = 1e-6;
    step.layer = blocks.data(), step.parts = slimwright_kv_parts();
    step.cosine = heap.floats(step.positions * step.rotary), step.sine = heap.floats(step.positions * step.rotary);
    step.final_gain = heap.floats(width);
    step.head = product(heap, 1 + below(200), width, type);
    const int64_t vocabulary = step.head.weight->rows;
    const float* hidden = heap.floats(batch * width);
    const int64_t outputs = step.outputs;
    std::vector<float> first(size_t(outputs * vocabulary)), second(size_t(outputs * vocabulary));
    for (std::vector<float>* out : {&first, &second}) {
        step.threads = out == &first ? 1 : 3;
        std::unique_ptr<float[]> own(new float[size_t(batch * width)]), logits(new float[size_t(outputs * vocabulary)]);
        memcpy(own.get(), hidden, size_t(batch * width) * 4);
        step.hidden = own.get(), step.logits = logits.get();
        if (const int wrong = slimwright_packed_step(&step)) {
            printf("FAILED: a right step gives error %d\n", wrong);
            exit(1);
        }
        memcpy(out->data(), logits.get(), first.size() * 4);
        for (size_t i = 0; i < all.size(); i++)  // the same tokens once more, into the same places
            all[i]->length -= apart ? tokens[i % size_t(caches)] : 1;
    }
    bool packs = false;  // a token that moves others to the packed part leaves another cache behind
    for (const SlimwrightKv* kv : all) packs |= kv->bits < 16;
    if (!packs && memcmp(first.data(), second.data(), first.size() * 4)) {
        printf("FAILED: bits depend on threads\n");
        exit(1);
    }
    // damage that can be seen: how much memory is behind a pointer cannot
    std::unique_ptr<float[]> own(new float[size_t(batch * width)]), logits(new float[size_t(outputs * vocabulary)]);
    step.hidden = own.get(), step.logits = logits.get();
    const auto refused = [&](int64_t& field, std::initializer_list<int64_t> wrong) {
        const int64_t kept = field;
        for (const int64_t value : wrong) {
            field = value;
            if (slimwright_packed_step(&step) == 0) {
                printf("FAILED: damage was not seen: %lld instead of %lld\n", static_cast<long long>(value),
                       static_cast<long long>(kept));
                exit(1);
            }
        }
        field = kept;
    };
    const int64_t large = int64_t(1) << 40;
    refused(step.batch, {0, -1, 1 << 13, large, INT64_MIN});
    refused(step.width, {0, -1, 1 << 13, large, INT64_MIN});
    refused(step.layers, {-1, INT64_MIN});
    refused(step.positions, {0, -1, 1 << 13, large});
    refused(step.type, {-1, 2, 3, large});
    refused(step.threads, {0, -1, 1 << 13, large});
    if (layers) refused(step.rotary, {-1, -2, 3, 1 << 13, large});
    refused(step.caches, {0, -1, 7, 1 << 13, large});
    refused(step.outputs, {0, -1, 7, 1 << 13, large});
    for (int64_t& count : tokens) refused(count, {0, -1, 7, large, INT64_MIN});
    if (some) refused(rows.back(), {-1, 7, large, INT64_MIN});
    for (SlimwrightKv* kv : all) {
        refused(kv->batch, {0, -1, 6, large});
        refused(kv->kv_heads, {0, -1, 7, large});
        refused(kv->key_dim, {0, -1, large});
        refused(kv->value_dim, {0, -1, large});
        refused(kv->length, {-2, INT64_MIN});
        if (!kv->sliding) refused(kv->length, {large});
        if (apart) refused(kv->batch, {2});
        refused(kv->window, {0, -1, INT64_MIN});
    }
    for (SlimwrightLayer& layer : blocks)
        for (SlimwrightProduct* one : {&layer.q, &layer.k, &layer.v, &layer.o, &layer.gate, &layer.up, &layer.down}) {
            Weight* w = const_cast<Weight*>(one->weight);
            w->rows++;
            if (slimwright_packed_step(&step) == 0) {
                printf("FAILED: a matrix of another shape was taken\n");
                exit(1);
            }
            w->rows--;
        }
}

int main(int count, char** words) {
    const int64_t rounds = count > 1 ? atoll(words[1]) : 200;
    random_bits.seed(count > 2 ? uint64_t(atoll(words[2])) : 0);
    for (int64_t i = 0; i < rounds; i++) one();
    printf("%s: %lld decoders\n", slimwright_packed_isa(), static_cast<long long>(rounds));
    return 0;
}
