// Attention of one step of sampling on a CPU, over keys and values that it stores itself. kernel.py compiles and calls
// it, and puts two lines in front, so that loops have a fixed length and read one type:
//     #define HEAD_DIM 64
//     #define STORED float | c10::BFloat16 | c10::Half | int8_t
//
// A row is one head of one candidate. It depends on nothing else in the batch. All sums are fp32.
//
// Axes: g groups (prompts and their null twins), c candidates of a group, h heads, b blocks.

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cmath>
#include <vector>

using namespace at::vec;
using Vec = Vectorized<float>;
constexpr int LANES = Vec::size(), SPAN = 32, WIDTH = (HEAD_DIM + 15) / 16 * 16;  // values are padded with zeros

// Keys and values of 32 positions. Keys lie channel by channel, so that no sum runs across a vector register.
template <class T>
struct Block {
    T keys[HEAD_DIM][SPAN];
    T values[SPAN][WIDTH];
    float key_scales[SPAN], value_scales[SPAN];  // what integers are multiplied by
};
static_assert(sizeof(Block<STORED>) == SPAN * ((HEAD_DIM + WIDTH) * sizeof(STORED) + 8));  // as kernel.py has it

template <class T>
static inline Vec as_floats(const T* from) {
    if constexpr (std::is_same_v<T, float>) return Vec::loadu(from);
    else return convert<float>(Vectorized<T>::loadu(from, LANES));
}

// Stores the numbers of a head `stride` apart; returns their scale, which is not finite if one of them is not.
template <class T>
static float store(const float* x, T* to, long stride) {
    if constexpr (std::is_same_v<T, int8_t>) {
        const float scale = reduce_all<float>([](Vec x, Vec y) { return maximum(x.abs(), y.abs()); }, x, HEAD_DIM) / 127;
        float steps[HEAD_DIM];
        map<float>([=](Vec x) { return (x / Vec(scale + 1e-20f)).round(); }, steps, x, HEAD_DIM);
        for (int i = 0; i < HEAD_DIM; i++) to[i * stride] = int8_t(steps[i]);
        return scale;
    }
    for (int i = 0; i < HEAD_DIM; i++) to[i * stride] = T(x[i]);
    return 1;
}

// Where the blocks of one row lie: all rows' first blocks, then all rows' second ones, so that memory is read in order.
template <class T>
struct Row {
    Block<T>* first;
    long rows;
    Block<T>& operator[](long block) const { return first[block * rows]; }
};

template <class T>
static void store_at(const float* k, const float* v, long slot, Row<T> row) {
    Block<T>& block = row[slot / SPAN];
    block.key_scales[slot % SPAN] = store(k, &block.keys[0][slot % SPAN], SPAN);
    block.value_scales[slot % SPAN] = store(v, block.values[slot % SPAN], 1);
}

// Scores of all positions of some blocks.
template <class T>
static void score(const float* query, Row<T> row, long first, long last, float* scores) {
    for (long b = first; b <= last; b++, scores += SPAN) {
        const Block<T>& block = row[b];
        Vec sums[SPAN / LANES];
        for (auto& sum : sums) sum = Vec(0);
        for (int i = 0; i < HEAD_DIM; i++) {
            __builtin_prefetch(block.values[i * SPAN / HEAD_DIM]);  // read next, too soon for the processor to foresee
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
static void add_values(const float* weights, Row<T> row, long start, long stop, Vec* sums) {
    Vec others[WIDTH / LANES];  // of every second value: two sums at a time
    for (auto& sum : others) sum = Vec(0);
    for (long j = start; j < stop; j++) {
        const Block<T>& block = row[j / SPAN];
        __builtin_prefetch(reinterpret_cast<const char*>(&block + 1) + j % SPAN * sizeof block.keys / SPAN);  // next row
        float weight = weights[j - start];
        if constexpr (std::is_same_v<T, int8_t>) weight *= block.value_scales[j % SPAN];
        for (int n = 0; n < WIDTH / LANES; n++) {
            Vec& sum = j % 2 ? others[n] : sums[n];
            sum = fmadd(Vec(weight), as_floats(block.values[j % SPAN] + n * LANES), sum);
        }
    }
    for (int n = 0; n < WIDTH / LANES; n++) sums[n] = sums[n] + others[n];
}

// Stores k and v [rows, count, HEAD_DIM] at some slots of blocks [b, rows].
template <class T>
static void store_all(const float* k, const float* v, const int64_t* slots, Block<T>* to, long rows, long count) {
    for (long at = 0; at < rows * count; at++)
        store_at(k + at * HEAD_DIM, v + at * HEAD_DIM, slots[at % count], Row<T>{to + at / count, rows});
}

extern "C" void store_prompt(const float* k, const float* v, const int64_t* slots, Block<float>* to, long rows, long count) {
    store_all(k, v, slots, to, rows, count);
}

extern "C" void store_image(const float* k, const float* v, const int64_t* slots, Block<STORED>* to, long rows, long count) {
    store_all(k, v, slots, to, rows, count);
}

// Stores k and v [g, c, h, count, HEAD_DIM] at some slots of the image blocks [b, all_pairs, c], then attends with q to
// t positions of the prompt blocks [b, all_pairs] and to the slots `start` to `stop` - 1 of the image blocks. all_pairs:
// groups * heads that the blocks have room for. bias [count, stop - start] is added to the scores of the image; may be
// null.
extern "C" void attend(const float* q, const float* k, const float* v, const int64_t* slots, const float* bias, float* out,
                       Block<float>* prompt, Block<STORED>* image, long all_pairs, long groups, long candidates,
                       long heads, long t, long count, long start, long stop) {
    const long prompt_blocks = (t + SPAN - 1) / SPAN, first = start / SPAN, last = (stop - 1) / SPAN;
    const long all = (prompt_blocks + last + 1 - first) * SPAN;
    const Vec scale(1 / std::sqrt(float(HEAD_DIM)));
#pragma omp parallel
    {
        std::vector<float> weights(all);  // of the prompt, padded to whole blocks, and of the image's blocks
        float *const begin = weights.data(), *const end = begin + all, *const own = begin + prompt_blocks * SPAN;
        float *const from = own + start % SPAN, *const to = from + stop - start;
#pragma omp for  // candidates of a prompt and a head one after the other: its keys stay in the fastest cache
        for (long unit = 0; unit < groups * heads * candidates; unit++) {
            const long pair = unit / candidates, candidate = unit % candidates;
            const long row = (pair / heads * candidates + candidate) * heads + pair % heads;
            const Row<float> shared{prompt + pair, all_pairs};
            const Row<STORED> mine{image + unit, all_pairs * candidates};
            for (long p = 0; p < count; p++) {
                const long at = (row * count + p) * HEAD_DIM;
                store_at(k + at, v + at, slots[p], mine);
            }
            for (long p = 0; p < count; p++) {
                const long at = (row * count + p) * HEAD_DIM;
                float query[HEAD_DIM], result[WIDTH];
                map<float>([=](Vec x) { return x * scale; }, query, q + at, HEAD_DIM);
                score(query, shared, 0, prompt_blocks - 1, begin);
                score(query, mine, first, last, own);
                std::fill(begin + t, from, -INFINITY);
                std::fill(to, end, -INFINITY);
                if (bias) map2<float>(std::plus<Vec>(), from, from, bias + p * (stop - start), stop - start);

                const Vec top(reduce_all<float>([](Vec x, Vec y) { return maximum(x, y); }, begin, all));
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
