// y = x Wᵀ of a matrix W with many zeros, for a few columns (rows of x) on a CPU with AVX-512; `sparse.py`
// packs W, compiles this file and says when it is used.
//
// W (rows, width) is three arrays, row by row, the last bit of a row's last word behind the width:
//   bits   (rows, ⌈width / 32⌉) int32   a bit a weight, 1 = kept, lowest bit first
//   values (kept + PAD)                 the kept weights one after another, float32 or bfloat16
//   start  (rows,) int64                where a row's values begin
// An expansion puts the values of 16 or 32 weights in their places, in a register: 0.125 bytes a weight and
// those of the kept ones are read, instead of all.
#include <immintrin.h>

#include <algorithm>
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
// bytes of values that are asked for early; 2048 and 8192 are as good
constexpr int64_t AHEAD = 4096;
// columns that share an expansion; twice as many accumulators are half of the 32 registers
constexpr int64_t MOST = 8;

// --- what differs between number formats ---

// What stands in each lane after an expansion: the value whose number is that of the bits below the lane.
// AMD's instruction takes 6 cycles (Zen 5); counting the bits and one permutation 3, with RANKS. Intel's takes
// 2, and would lose by it
alignas(64) constexpr uint32_t BELOW_16[16] = {
    0, 1, 3, 7, 15, 31, 63, 127, 255, 511, 1023, 2047, 4095, 8191, 16383, 32767,
};

struct Single {
    using Value = float;
    using Bits = uint16_t;
    using Vector = __m512;
    static constexpr int64_t STEP = 16;

    static Bits first(int64_t count) { return count < STEP ? (1u << count) - 1 : 0xffff; }
    static Vector load(const Value* p) { return _mm512_loadu_ps(p); }
    static Vector load(const Value* p, Bits which) { return _mm512_maskz_loadu_ps(which, p); }
    static void store(Value* p, Bits which, Vector v) { _mm512_mask_storeu_ps(p, which, v); }
    static Vector expand(const Bits* kept, Vector v) {
#ifdef RANKS
        auto below = _mm512_and_si512(_mm512_set1_epi32(*kept), _mm512_load_si512(BELOW_16));
        return _mm512_maskz_permutexvar_ps(*kept, _mm512_popcnt_epi32(below), v);
#else
        return _mm512_maskz_expand_ps(*kept, v);
#endif
    }
    static __m512 multiply_add(__m512 sum, Vector w, Vector x) { return _mm512_fmadd_ps(w, x, sum); }
};

#ifdef BRAIN
struct Brain {
    using Value = BFloat16;
    using Bits = uint32_t;
    using Vector = __m512i;
    static constexpr int64_t STEP = 32;

    static Bits first(int64_t count) { return count < STEP ? (1u << count) - 1 : ~0u; }
    static Vector load(const Value* p) { return _mm512_loadu_si512(p); }
    static Vector load(const Value* p, Bits which) { return _mm512_maskz_loadu_epi16(which, p); }
    static void store(Value* p, Bits which, Vector v) { _mm512_mask_storeu_epi16(p, which, v); }
    static Vector expand(const Bits* kept, Vector v) {
#ifdef RANKS
        // no instruction counts 32 bits in a lane of 16: the lower half of them, then the upper
        auto halves = (const uint16_t*)kept;
        auto narrow = _mm512_cvtepi32_epi16(_mm512_load_si512(BELOW_16));
        auto lower = _mm512_inserti64x4(_mm512_set1_epi16(-1), narrow, 0);
        auto upper = _mm512_inserti64x4(_mm512_setzero_si512(), narrow, 1);
        lower = _mm512_and_si512(_mm512_set1_epi16(halves[0]), lower);
        upper = _mm512_and_si512(_mm512_set1_epi16(halves[1]), upper);
        auto rank = _mm512_add_epi16(_mm512_popcnt_epi16(lower), _mm512_popcnt_epi16(upper));
        return _mm512_maskz_permutexvar_epi16(*kept, rank, v);
#else
        return _mm512_maskz_expand_epi16(*kept, v);
#endif
    }
    // exact products, sums in float32; it takes denormals for zero
    static __m512 multiply_add(__m512 sum, Vector w, Vector x) {
        return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)x);
    }
};
#endif

// --- one row ---

template <class F>
struct Row {
    const typename F::Bits* bits;
    const typename F::Value* values;

    // the next STEP weights
    typename F::Vector next() {
        auto packed = F::load(values);
        // keeps the compiler from one instruction for both: expansion from memory is slow on Zen 4
        asm("" : "+v"(packed));
        // with several columns the CPU does not look ahead by itself: 2.8 ms instead of 5.3 for four columns
        // of 11008 × 4096 in bfloat16, half of it zeros
        _mm_prefetch((const char*)values + AHEAD, _MM_HINT_T0);
        auto w = F::expand(bits, packed);
        values += _mm_popcnt_u32(*bits++);
        return w;
    }
};

// y[c * rows] = Σ_i row_i x[c * width + i] of N columns c
template <class F, int N>
void dot(Row<F> row, const typename F::Value* x, int64_t width, typename F::Value* y, int64_t rows) {
    // two sums each, so that an addition need not wait for the last one
    __m512 sum[2][N] = {};
    int64_t i = 0;
    for (; i + 2 * F::STEP <= width; i += 2 * F::STEP) {
        for (int half = 0; half < 2; half++) {
            auto w = row.next();
            for (int c = 0; c < N; c++) {
                auto v = F::load(x + c * width + i + half * F::STEP);
                sum[half][c] = F::multiply_add(sum[half][c], w, v);
            }
        }
    }
    // what two whole steps do not cover; nothing behind the end of x is read
    for (; i < width; i += F::STEP) {
        auto w = row.next();
        auto inside = F::first(width - i);
        for (int c = 0; c < N; c++)
            sum[0][c] = F::multiply_add(sum[0][c], w, F::load(x + c * width + i, inside));
    }
    for (int c = 0; c < N; c++)
        y[c * rows] = typename F::Value(_mm512_reduce_add_ps(_mm512_add_ps(sum[0][c], sum[1][c])));
}

template <class F>
void write_row(Row<F> row, typename F::Value* out, int64_t width) {
    for (int64_t i = 0; i < width; i += F::STEP) {
        auto w = row.next();
        F::store(out + i, F::first(width - i), w);
    }
}

// --- matrices ---

template <class F>
struct Matrix {
    const char* bits;
    const typename F::Value* values;
    const int64_t* start;
    int64_t rows, row_bytes;

    Matrix(const Tensor& b, const Tensor& v, const Tensor& s)
        : bits((const char*)b.data_ptr()), values((const typename F::Value*)v.data_ptr()),
          start((const int64_t*)s.data_ptr()), rows(b.size(0)), row_bytes(4 * b.size(1)) {}

    Row<F> row(int64_t r) const {
        return {(const typename F::Bits*)(bits + r * row_bytes), values + start[r]};
    }
};

template <class F>
using Dot = void (*)(Row<F>, const typename F::Value*, int64_t, typename F::Value*, int64_t);

// rows begin … end of y (n, rows) = x (n, width) Wᵀ. All columns of a row before the next one: the second
// eight find its values in the cache
template <class F>
void product(const Matrix<F>& m, int64_t begin, int64_t end, const typename F::Value* x, int64_t n,
             int64_t width, typename F::Value* y) {
    static constexpr Dot<F> of[MOST] = {
        dot<F, 1>, dot<F, 2>, dot<F, 3>, dot<F, 4>, dot<F, 5>, dot<F, 6>, dot<F, 7>, dot<F, 8>,
    };
    for (int64_t r = begin; r < end; r++)
        for (int64_t c = 0; c < n; c += MOST)
            of[std::min(MOST, n - c) - 1](m.row(r), x + c * width, width, y + c * m.rows + r, m.rows);
}

// All matrices share x, and one barrier
template <class F>
Tensors products(const Tensor& x, const Tensors& bits, const Tensors& values, const Tensors& start) {
    int64_t width = x.size(x.dim() - 1);
    int64_t n = x.numel() / width;
    std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
    std::vector<Matrix<F>> matrices;
    Tensors found;
    int64_t total = 0;
    for (size_t i = 0; i < bits.size(); i++) {
        matrices.emplace_back(bits[i], values[i], start[i]);
        shape.back() = matrices[i].rows;
        found.push_back(torch::stable::new_empty(x, shape));
        total += shape.back();
    }
    auto source = (const typename F::Value*)x.data_ptr();
    auto work = [&](int64_t begin, int64_t end) {
        for (size_t i = 0; i < matrices.size(); i++) {
            auto last = std::min(end, matrices[i].rows);
            if (begin < last)
                product(matrices[i], begin, last, source, n, width, (typename F::Value*)found[i].data_ptr());
            // numbers of rows go on from matrix to matrix
            begin = std::max<int64_t>(0, begin - matrices[i].rows);
            end -= matrices[i].rows;
            if (end <= 0)
                break;
        }
    };
    torch::stable::parallel_for(0, total, std::max<int64_t>(1, GRAIN / width), work);
    return found;
}

template <class F>
Tensor unpacked(const Tensor& bits, const Tensor& values, const Tensor& start, int64_t width) {
    Matrix<F> m(bits, values, start);
    Tensor out = torch::stable::new_empty(values, {m.rows, width});
    auto target = (typename F::Value*)out.data_ptr();
    auto work = [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; r++)
            write_row<F>(m.row(r), target + r * width, width);
    };
    torch::stable::parallel_for(0, m.rows, std::max<int64_t>(1, GRAIN / width), work);
    return out;
}

// --- operations ---

void check(const Tensor& bits, const Tensor& values, const Tensor& start, int64_t width, ScalarType type) {
    STD_TORCH_CHECK(bits.size(1) == (width + 31) / 32, "the packed matrix is not ", width, " wide");
    STD_TORCH_CHECK(start.size(0) == bits.size(0), "bits and start are of different matrices");
    STD_TORCH_CHECK(values.scalar_type() == type, "the packed matrix has another dtype");
    for (auto* part : {&bits, &values, &start})
        STD_TORCH_CHECK(part->is_contiguous(), "a part of the packed matrix has gaps");
}

Tensors packed_linear(Tensor x, Tensors bits, Tensors values, Tensors start) {
    x = torch::stable::contiguous(x);
    for (size_t i = 0; i < bits.size(); i++)
        check(bits[i], values[i], start[i], x.size(x.dim() - 1), x.scalar_type());
#ifdef BRAIN
    if (x.scalar_type() == ScalarType::BFloat16)
        return products<Brain>(x, bits, values, start);
#endif
    STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float, "float32 and, where the CPU has it, bfloat16");
    return products<Single>(x, bits, values, start);
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
