// Runs a program: each operation as the family recorded it, for the rows of this step.
#include "program.hpp"

#include <cstring>

#include "layers.hpp"

namespace loci {
namespace {

const float* floats(const void* p) { return static_cast<const float*>(p); }
float* floats(void* p) { return static_cast<float*>(p); }

// out [rows][columns] = x by its root mean square, times a weight [columns] or none
void norm(const Team& team, const Operation& op, const StepInput& step) {
    rms_norm(team, floats(op.in[0]), floats(op.in[1]), step.rows, op.sizes[0], op.factor, floats(op.out[0]));
}

// one to three packed matrices times the same x, each to a result of its own
void linear(const Team& team, const Operation& op, const StepInput& step) {
    const auto* matrices = static_cast<const Matrix* const*>(op.in[1]);
    float* out[3];
    for (int i = 0; i < 3; ++i) out[i] = floats(op.out[i]);
    linear_group(team, matrices, out, op.sizes[0], floats(op.in[0]), step.rows);
}

// a plain matrix times x: its kind, rows and columns
void dense(const Team& team, const Operation& op, const StepInput& step) {
    dense_linear(team, op.in[1], static_cast<int>(op.sizes[0]), op.sizes[1], op.sizes[2], floats(op.in[0]), step.rows,
                 floats(op.out[0]));
}

// x [rows][heads][dim] turned by the row of a table [positions][pairs] that its position names
void rotate(const Team& team, const Operation& op, const StepInput& step) {
    const int64_t heads = op.sizes[0], dim = op.sizes[1], pairs = op.sizes[2], width = heads * dim;
    for (int64_t r = 0; r < step.rows; ++r)
        rotate(team, floats(op.in[0]) + r * width, floats(op.in[1]) + 2 * pairs * step.positions[r], 1, heads, dim,
               pairs, floats(op.out[0]) + r * width);
}

// keys and values [rows][kv_heads][dim] to their places in a layer's cache
void append(const Operation& op, const StepInput& step) {
    const int64_t heads = op.sizes[0], dim = op.sizes[1], head_stride = op.sizes[2], slot_stride = op.sizes[3];
    for (int side = 0; side < 2; ++side)
        for (int64_t r = 0; r < step.rows; ++r)
            for (int64_t h = 0; h < heads; ++h)
                std::memcpy(
                    floats(op.out[side]) + step.slots[r] * slot_stride + h * head_stride + step.positions[r] * dim,
                    floats(op.in[side]) + (r * heads + h) * dim, static_cast<size_t>(dim) * sizeof(float));
}

// queries [rows][heads][dim] over all that their slots hold in a layer's cache of keys and values
void attend(const Team& team, const Operation& op, const StepInput& step) {
    const int64_t heads = op.sizes[0], kv_heads = op.sizes[1], dim = op.sizes[2];
    for (int64_t r = 0; r < step.rows; ++r) {
        const int64_t slot = step.slots[r] * op.sizes[4];
        Attend call{};
        call.q = floats(op.in[0]) + r * heads * dim;
        call.keys = floats(op.in[1]) + slot;
        call.values = floats(op.in[2]) + slot;
        call.tokens = 1;
        call.heads = heads;
        call.kv_heads = kv_heads;
        call.dim = dim;
        call.head_stride = op.sizes[3];
        call.before = step.positions[r];
        call.window = step.positions[r] + 1;
        attend(team, call, floats(op.out[0]) + r * heads * dim);
    }
}

void run(const Team& team, const Operation& op, const StepInput& step) {
    const int64_t n = step.rows * op.sizes[0];
    switch (op.kind) {
        case Kind::kNorm: return norm(team, op, step);
        case Kind::kLinear: return linear(team, op, step);
        case Kind::kDense: return dense(team, op, step);
        case Kind::kRotate: return rotate(team, op, step);
        case Kind::kAppend: return append(op, step);
        case Kind::kAttend: return attend(team, op, step);
        case Kind::kGated: return gated(team, floats(op.in[0]), floats(op.in[1]), op.factor, n, floats(op.out[0]));
        case Kind::kAdd:
            for (int64_t i = 0; i < n; ++i) floats(op.out[0])[i] = floats(op.in[0])[i] + floats(op.in[1])[i];
            return;
        case Kind::kScale:
            for (int64_t i = 0; i < n; ++i) floats(op.out[0])[i] = floats(op.in[0])[i] * op.factor;
    }
}

}  // namespace

void run_program(const Team& team, const Operation* operations, int64_t count, const StepInput& step) {
    for (int64_t i = 0; i < count; ++i) run(team, operations[i], step);
}

}  // namespace loci
