// Attention of one step of sampling on a CPU, over keys and values that it stores itself. kernel.py compiles and calls
// it, and puts four lines in front, so that loops have a fixed length and read one type:
//     #define HEAD_DIM 64
//     #define STORED float | c10::BFloat16 | c10::Half | int8_t
//     #define SPAN 32
//     #define BLOCK_BYTES 4352
//
// A unit is one head of one candidate. It depends on nothing else in the batch. All sums are fp32.
//
// Axes: g groups (prompts and their null twins), c candidates of a group, h heads, b blocks.

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <type_traits>
#include <vector>

using namespace at::vec;
using Vec = Vectorized<float>;
constexpr int LANES = Vec::size(), WIDTH = (HEAD_DIM + 15) / 16 * 16;  // values are padded with zeros

// What stored integers are multiplied by; other types have none.
template <class T>
struct Scales {};
template <>
struct Scales<int8_t> {
    float key_scales[SPAN], value_scales[SPAN];
};

// Keys and values of SPAN positions. Keys lie channel by channel, so that no sum runs across a vector register.
template <class T>
struct Block : Scales<T> {
    T keys[HEAD_DIM][SPAN];
    T values[SPAN][WIDTH];
};
static_assert(sizeof(Block<STORED>) == BLOCK_BYTES);

template <class T>
static inline Vec as_floats(const T* from) {
    if constexpr (std::is_same_v<T, float>) return Vec::loadu(from);
    else if constexpr (std::is_same_v<T, int8_t>) return convert<float>(Vectorized<T>::loadu_one_fourth(from));
    else return convert<float>(Vectorized<T>::loadu(from, LANES));
}

// Stores the numbers of a head `stride` apart. Returns the scale of integers; it is NaN or infinite if a number is.
template <class T>
static float store(const float* x, T* to, long stride) {
    if constexpr (std::is_same_v<T, int8_t>) {
        auto larger = [](Vec x, Vec y) { return maximum(x.abs(), y.abs()); };
        const float scale = reduce_all<float>(larger, x, HEAD_DIM) / 127;
        const float factor = std::isfinite(scale) ? 1 / (scale + 1e-20f) : 0;
        float steps[HEAD_DIM];
        map<float>([=](Vec x) { return (x * Vec(factor)).round(); }, steps, x, HEAD_DIM);
        for (int i = 0; i < HEAD_DIM; i++) to[i * stride] = factor ? int8_t(steps[i]) : 0;
        return scale;
    } else {
        for (int i = 0; i < HEAD_DIM; i++) to[i * stride] = T(x[i]);
        return 1;
    }
}

// The blocks of one unit: the first blocks of all units lie side by side, then all second ones.
template <class T>
struct Blocks {
    Block<T>* first;
    long units;
    Block<T>& operator[](long block) const { return first[block * units]; }
};

template <class T>
static void store_at(const float* k, const float* v, long slot, Blocks<T> blocks) {
    Block<T>& block = blocks[slot / SPAN];
    const long at = slot % SPAN;
    const float key_scale = store(k, &block.keys[0][at], SPAN), value_scale = store(v, block.values[at], 1);
    if constexpr (std::is_same_v<T, int8_t>) block.key_scales[at] = key_scale, block.value_scales[at] = value_scale;
}

// Scores of all positions of some blocks.
template <class T>
static void score(const float* query, Blocks<T> blocks, long first, long last, float* scores) {
    for (long b = first; b <= last; b++, scores += SPAN) {
        const Block<T>& block = blocks[b];
        Vec sums[SPAN / LANES];
        for (auto& sum : sums) sum = Vec(0);
        for (int i = 0; i < HEAD_DIM; i++) {
            __builtin_prefetch(block.values[i * SPAN / HEAD_DIM]);  // they are read next
            for (int n = 0; n < SPAN / LANES; n++)
                sums[n] = fmadd(Vec(query[i]), as_floats(&block.keys[i][n * LANES]), sums[n]);
        }
        for (int n = 0; n < SPAN / LANES; n++) {
            if constexpr (std::is_same_v<T, int8_t>) sums[n] = sums[n] * Vec::loadu(block.key_scales + n * LANES);
            sums[n].store(scores + n * LANES);
        }
    }
}

// Adds the values of positions `start` to `stop` - 1, weighted.
template <class T>
static void add_values(const float* weights, Blocks<T> blocks, long start, long stop, Vec* sums) {
    Vec others[WIDTH / LANES];  // of every second value: two sums at a time
    for (auto& sum : others) sum = Vec(0);
    for (long j = start; j < stop; j++) {
        const Block<T>& block = blocks[j / SPAN];
        const char* next_unit = reinterpret_cast<const char*>((&block + 1)->keys);
        __builtin_prefetch(next_unit + j % SPAN * sizeof block.keys / SPAN);
        float weight = weights[j - start];
        if constexpr (std::is_same_v<T, int8_t>) weight *= block.value_scales[j % SPAN];
        for (int n = 0; n < WIDTH / LANES; n++) {
            Vec& sum = j % 2 ? others[n] : sums[n];
            sum = fmadd(Vec(weight), as_floats(block.values[j % SPAN] + n * LANES), sum);
        }
    }
    for (int n = 0; n < WIDTH / LANES; n++) sums[n] = sums[n] + others[n];
}

// Stores k and v [pairs, count, HEAD_DIM] at some slots of blocks [b, pairs, candidates], for every candidate.
template <class T>
static void store_all(const float* k, const float* v, const int64_t* slots, Block<T>* to, long pairs, long candidates,
                      long count) {
    for (long unit = 0; unit < pairs * candidates; unit++)
        for (long p = 0; p < count; p++) {
            const long at = (unit / candidates * count + p) * HEAD_DIM;
            store_at(k + at, v + at, slots[p], Blocks<T>{to + unit, pairs * candidates});
        }
}

extern "C" void store_prompt(const float* k, const float* v, const int64_t* slots, Block<float>* to, long pairs,
                             long count) {
    store_all(k, v, slots, to, pairs, 1, count);
}

extern "C" void store_image(const float* k, const float* v, const int64_t* slots, Block<STORED>* to, long pairs,
                            long candidates, long count) {
    store_all(k, v, slots, to, pairs, candidates, count);
}

// Stores k and v [g, c, h, count, HEAD_DIM] at some slots of the image blocks [b, all_pairs, c], then attends with q
// [g, c, h, queries, HEAD_DIM] to t positions of the prompt blocks [b, all_pairs] and to the slots `start` to `stop` - 1
// of the image blocks. all_pairs: groups * heads that the blocks have room for. bias [queries, stop - start] is added to
// the scores of the image; may be null.
extern "C" void attend(const float* q, const float* k, const float* v, const int64_t* slots, const float* bias,
                       float* out, Block<float>* prompt, Block<STORED>* image, long all_pairs, long groups,
                       long candidates, long heads, long t, long count, long queries, long start, long stop,
                       long threads) {
    const long prompt_blocks = (t + SPAN - 1) / SPAN, first = start / SPAN, last = (stop - 1) / SPAN;
    const long all = (prompt_blocks + last + 1 - first) * SPAN;
    const Vec scale(1 / std::sqrt(float(HEAD_DIM)));
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> weights(all);  // of the prompt, padded to whole blocks, and of the image's blocks
        float *const begin = weights.data(), *const end = begin + all, *const own = begin + prompt_blocks * SPAN;
        float *const from = own + start % SPAN, *const to = from + stop - start;
#pragma omp for  // candidates of a prompt and a head one after the other: its keys stay in a cache of the core
        for (long unit = 0; unit < groups * heads * candidates; unit++) {
            const long pair = unit / candidates, candidate = unit % candidates;
            const long row = (pair / heads * candidates + candidate) * heads + pair % heads;
            const Blocks<float> shared{prompt + pair, all_pairs};
            const Blocks<STORED> mine{image + unit, all_pairs * candidates};
            for (long p = 0; p < count; p++) {
                const long at = (row * count + p) * HEAD_DIM;
                store_at(k + at, v + at, slots[p], mine);
            }
            for (long p = 0; p < queries; p++) {
                const long at = (row * queries + p) * HEAD_DIM;
                float query[HEAD_DIM], result[WIDTH];
                map<float>([=](Vec x) { return x * scale; }, query, q + at, HEAD_DIM);
                score(query, shared, 0, prompt_blocks - 1, begin);
                score(query, mine, first, last, own);
                std::fill(begin + t, from, -INFINITY);
                std::fill(to, end, -INFINITY);
                if (bias) map2<float>(std::plus<Vec>(), from, from, bias + p * (stop - start), stop - start);

                auto larger = [](Vec x, Vec y) { return maximum(x, y); };
                const Vec top(reduce_all<float>(larger, begin, all));
                map<float>([=](Vec x) { return (x - top).exp(); }, begin, begin, all);
                const Vec total(reduce_all<float>(std::plus<Vec>(), begin, all));

                Vec sums[WIDTH / LANES];
                for (auto& sum : sums) sum = Vec(0);
                add_values(begin, shared, 0, t, sums);
                add_values(from, mine, start, stop, sums);
                for (int n = 0; n < WIDTH / LANES; n++) (sums[n] / total).store(result + n * LANES);
                std::copy(result, result + HEAD_DIM, out + at);
            }
        }
    }
}
