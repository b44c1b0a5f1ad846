// y = x Wᵀ of a matrix W with many zeros, for a few columns (rows of x) on a CPU with AVX-512; `sparse.py`
// packs W, compiles this file and says when it is used.
//
// W is read as one stream: four rows at a time, and of these 32 weights of each in turn. Short groups of rows
// and lines end in zeros. Three arrays:
//   bits   (groups, ⌈width / 32⌉, 4) int32   a bit a weight, 1 = kept, lowest bit first
//   values (kept + PAD,)                     the kept weights in that order, float32 or bfloat16
//   start  (groups,) int64                   where a group's values begin
// An expansion puts the values of 16 or 32 weights in their places, in a register: 0.125 bytes a weight and
// those of the kept ones are read, instead of all.
#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>

using torch::headeronly::BFloat16;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

#if defined(__AVX512BF16__) && defined(__AVX512VBMI2__)
#define BRAIN
#endif

// weights that a thread should have at least: below, waking it up costs more than it does
constexpr int64_t GRAIN = 1 << 17;
// rows of a group: what is loaded of x serves all of them
constexpr int64_t ROWS = 4;
// weights of a word of bits
constexpr int64_t WORD = 32;
// columns that share an expansion: with ROWS of them half of the 32 registers hold sums
constexpr int64_t MOST = 4;
// bytes of values that are asked for early; 2048 and 8192 are as good
constexpr int64_t AHEAD = 4096;

// --- what differs between number formats ---

// What stands in each lane after an expansion: the value whose number is that of the bits below the lane.
// AMD's instruction takes 6 cycles (Zen 5); counting the bits and one permutation 3, with RANKS. Intel's takes
// 2, and would lose by it
alignas(64) constexpr uint32_t BELOW_16[16] = {
    0, 1, 3, 7, 15, 31, 63, 127, 255, 511, 1023, 2047, 4095, 8191, 16383, 32767,
};

struct Single {
    using Value = float;
    // a word is two registers
    struct Vector {
        __m512 half[2];
    };
    // lines of the cache that a step over a group reads, at half of the weights
    static constexpr int64_t LINES = 4;

    static Vector load(const Value* p) { return {_mm512_loadu_ps(p), _mm512_loadu_ps(p + 16)}; }
    static Vector load(const Value* p, uint32_t which) {
        return {_mm512_maskz_loadu_ps(which, p), _mm512_maskz_loadu_ps(which >> 16, p + 16)};
    }
    static void store(Value* p, uint32_t which, Vector v) {
        _mm512_mask_storeu_ps(p, which, v.half[0]);
        _mm512_mask_storeu_ps(p + 16, which >> 16, v.half[1]);
    }
    static __m512 expand(uint16_t kept, const Value*& p) {
        auto packed = _mm512_loadu_ps(p);
        p += _mm_popcnt_u32(kept);
#ifdef RANKS
        auto below = _mm512_and_si512(_mm512_set1_epi32(kept), _mm512_load_si512(BELOW_16));
        return _mm512_maskz_permutexvar_ps(kept, _mm512_popcnt_epi32(below), packed);
#else
        // keeps the compiler from one instruction for both: expansion from memory is slow on Zen 4
        asm("" : "+v"(packed));
        return _mm512_maskz_expand_ps(kept, packed);
#endif
    }
    static Vector next(const uint32_t* bits, const Value*& p) {
        uint32_t kept = *bits;
        auto lower = expand(kept, p);
        return {lower, expand(kept >> 16, p)};
    }
    static __m512 multiply_add(__m512 sum, Vector w, Vector x) {
        sum = _mm512_fmadd_ps(w.half[0], x.half[0], sum);
        return _mm512_fmadd_ps(w.half[1], x.half[1], sum);
    }
};

#ifdef BRAIN
struct Brain {
    using Value = BFloat16;
    using Vector = __m512i;
    static constexpr int64_t LINES = 2;

    static Vector load(const Value* p) { return _mm512_loadu_si512(p); }
    static Vector load(const Value* p, uint32_t which) { return _mm512_maskz_loadu_epi16(which, p); }
    static void store(Value* p, uint32_t which, Vector v) { _mm512_mask_storeu_epi16(p, which, v); }
    static Vector next(const uint32_t* bits, const Value*& p) {
        uint32_t kept = *bits;
        auto packed = _mm512_loadu_si512(p);
        p += _mm_popcnt_u32(kept);
#ifdef RANKS
        // no instruction counts 32 bits in a lane of 16: the lower half of them, then the upper
        auto halves = (const uint16_t*)bits;
        auto narrow = _mm512_cvtepi32_epi16(_mm512_load_si512(BELOW_16));
        auto lower = _mm512_inserti64x4(_mm512_set1_epi16(-1), narrow, 0);
        auto upper = _mm512_inserti64x4(_mm512_setzero_si512(), narrow, 1);
        lower = _mm512_and_si512(_mm512_set1_epi16(halves[0]), lower);
        upper = _mm512_and_si512(_mm512_set1_epi16(halves[1]), upper);
        auto rank = _mm512_add_epi16(_mm512_popcnt_epi16(lower), _mm512_popcnt_epi16(upper));
        return _mm512_maskz_permutexvar_epi16(kept, rank, packed);
#else
        asm("" : "+v"(packed));
        return _mm512_maskz_expand_epi16(kept, packed);
#endif
    }
    // exact products, sums in float32; it takes denormals for zero
    static __m512 multiply_add(__m512 sum, Vector w, Vector x) {
        return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)x);
    }
};
#endif

// --- one group of rows ---

// of the first `count` weights of a word
uint32_t first(int64_t count) { return count < WORD ? (1u << count) - 1 : ~0u; }

template <class F>
struct Group {
    const uint32_t* bits;
    const typename F::Value* values;

    // the next word of one row
    typename F::Vector next() { return F::next(bits++, values); }

    // with several columns the CPU does not look ahead by itself
    void ask() const {
        for (int64_t line = 0; line < F::LINES; line++)
            _mm_prefetch((const char*)values + AHEAD + 64 * line, _MM_HINT_T0);
    }
};

// y[c * stride + r] = Σ_i row_r[i] x[c * width + i] of N columns c and the first `rows` rows
template <class F, int N>
void dot(Group<F> group, const typename F::Value* x, int64_t width, typename F::Value* y, int64_t stride,
         int64_t rows) {
    __m512 sum[ROWS][N] = {};
    auto step = [&](auto load) {
        group.ask();
        typename F::Vector w[ROWS];
        for (auto& one : w)
            one = group.next();
        for (int c = 0; c < N; c++) {
            auto v = load(x + c * width);
            for (int r = 0; r < ROWS; r++)
                sum[r][c] = F::multiply_add(sum[r][c], w[r], v);
        }
    };
    int64_t i = 0;
    for (; i + WORD <= width; i += WORD)
        step([i](auto* column) { return F::load(column + i); });
    // nothing behind the end of x is read
    if (i < width)
        step([i, width](auto* column) { return F::load(column + i, first(width - i)); });
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < N; c++)
            y[c * stride + r] = typename F::Value(_mm512_reduce_add_ps(sum[r][c]));
}

template <class F>
void write_group(Group<F> group, typename F::Value* out, int64_t width) {
    for (int64_t i = 0; i < width; i += WORD)
        for (int64_t r = 0; r < ROWS; r++) {
            auto w = group.next();
            F::store(out + r * width + i, first(width - i), w);
        }
}

// --- matrices ---

template <class F>
struct Matrix {
    const uint32_t* bits;
    const typename F::Value* values;
    const int64_t* start;
    int64_t groups, words;

    Matrix(const Tensor& b, const Tensor& v, const Tensor& s)
        : bits((const uint32_t*)b.data_ptr()), values((const typename F::Value*)v.data_ptr()),
          start((const int64_t*)s.data_ptr()), groups(b.size(0)), words(ROWS * b.size(1)) {}

    Group<F> group(int64_t g) const { return {bits + g * words, values + start[g]}; }
};

template <class F>
using Dot = void (*)(Group<F>, const typename F::Value*, int64_t, typename F::Value*, int64_t, int64_t);

// groups begin … end of y (n, rows) = x (n, width) Wᵀ. All columns of a group before the next one: the second
// four find its values in the cache
template <class F>
void product(const Matrix<F>& m, int64_t begin, int64_t end, const typename F::Value* x, int64_t n,
             int64_t width, typename F::Value* y, int64_t rows) {
    static constexpr Dot<F> of[MOST] = {dot<F, 1>, dot<F, 2>, dot<F, 3>, dot<F, 4>};
    for (int64_t g = begin; g < end; g++) {
        int64_t r = g * ROWS;
        for (int64_t c = 0; c < n; c += MOST) {
            auto one = of[std::min(MOST, n - c) - 1];
            one(m.group(g), x + c * width, width, y + c * rows + r, rows, std::min(ROWS, rows - r));
        }
    }
}

// All matrices share x, and one barrier. rows: of each
template <class F>
Tensors products(const Tensor& x, const Tensors& bits, const Tensors& values, const Tensors& start,
                 const std::vector<int64_t>& rows) {
    int64_t width = x.size(x.dim() - 1);
    int64_t n = x.numel() / width;
    std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
    std::vector<Matrix<F>> matrices;
    Tensors found;
    int64_t total = 0;
    for (size_t i = 0; i < bits.size(); i++) {
        matrices.emplace_back(bits[i], values[i], start[i]);
        shape.back() = rows[i];
        found.push_back(torch::stable::new_empty(x, shape));
        total += matrices[i].groups;
    }
    auto source = (const typename F::Value*)x.data_ptr();
    auto work = [&](int64_t begin, int64_t end) {
        for (size_t i = 0; i < matrices.size(); i++) {
            auto& m = matrices[i];
            auto last = std::min(end, m.groups);
            auto target = (typename F::Value*)found[i].data_ptr();
            if (begin < last)
                product(m, begin, last, source, n, width, target, rows[i]);
            // numbers of groups go on from matrix to matrix
            begin = std::max<int64_t>(0, begin - m.groups);
            end -= m.groups;
            if (end <= 0)
                break;
        }
    };
    torch::stable::parallel_for(0, total, std::max<int64_t>(1, GRAIN / (ROWS * width)), work);
    return found;
}

// whole groups: (4 groups, width)
template <class F>
Tensor unpacked(const Tensor& bits, const Tensor& values, const Tensor& start, int64_t width) {
    Matrix<F> m(bits, values, start);
    Tensor out = torch::stable::new_empty(values, {ROWS * m.groups, width});
    auto target = (typename F::Value*)out.data_ptr();
    auto work = [&](int64_t begin, int64_t end) {
        for (int64_t g = begin; g < end; g++)
            write_group<F>(m.group(g), target + g * ROWS * width, width);
    };
    torch::stable::parallel_for(0, m.groups, std::max<int64_t>(1, GRAIN / (ROWS * width)), work);
    return out;
}

// --- operations ---

void check(const Tensor& bits, const Tensor& values, const Tensor& start, int64_t width, ScalarType type) {
    STD_TORCH_CHECK(bits.size(1) == (width + WORD - 1) / WORD, "the packed matrix is not ", width, " wide");
    STD_TORCH_CHECK(bits.size(2) == ROWS && start.size(0) == bits.size(0), "bits and start do not fit");
    STD_TORCH_CHECK(values.scalar_type() == type, "the packed matrix has another dtype");
    for (auto* part : {&bits, &values, &start})
        STD_TORCH_CHECK(part->is_contiguous(), "a part of the packed matrix has gaps");
}

Tensors packed_linear(Tensor x, Tensors bits, Tensors values, Tensors start, std::vector<int64_t> rows) {
    x = torch::stable::contiguous(x);
    for (size_t i = 0; i < bits.size(); i++) {
        check(bits[i], values[i], start[i], x.size(x.dim() - 1), x.scalar_type());
        STD_TORCH_CHECK((rows[i] + ROWS - 1) / ROWS == bits[i].size(0), "there are not ", rows[i], " rows");
    }
#ifdef BRAIN
    if (x.scalar_type() == ScalarType::BFloat16)
        return products<Brain>(x, bits, values, start, rows);
#endif
    STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float, "float32 and, where the CPU has it, bfloat16");
    return products<Single>(x, bits, values, start, rows);
}

Tensor unpack(Tensor bits, Tensor values, Tensor start, int64_t width) {
    check(bits, values, start, width, values.scalar_type());
#ifdef BRAIN
    if (values.scalar_type() == ScalarType::BFloat16)
        return unpacked<Brain>(bits, values, start, width);
#endif
    STD_TORCH_CHECK(values.scalar_type() == ScalarType::Float, "float32 and, where the CPU has it, bfloat16");
    return unpacked<Single>(bits, values, start, width);
}

// their schemas stand in sparse.py
STABLE_TORCH_LIBRARY_IMPL(nanolost, CPU, m) {
    m.impl("packed_linear", TORCH_BOX(&packed_linear));
    m.impl("unpack", TORCH_BOX(&unpack));
}
