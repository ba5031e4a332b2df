#include "ops/routed_linear.h"

#include "common/huge_pages.h"
#include "common/parallel.h"
#include "common/task_tiles.h"
#include "common/tiles_cpu.h"

namespace pymerge {
namespace {

// What is multiplied at a time, so that mixed weights stay in a core's second-level cache until they are used: up to
// group_samples weights of depth_step x one tile's width, and the part of x that they are multiplied with in the
// last-level cache. Results depend on depth_step alone.
constexpr std::int64_t depth_step = 256;
constexpr std::int64_t group_samples = 8;
constexpr std::int64_t batch_tokens = 4096;
constexpr std::int64_t piece_tokens = 512;

// Tokens of one sample.
struct Piece {
    std::int64_t sample, begin, end;
};

// Pieces first to last of a batch; their samples, of which the weights are mixed together.
struct Group {
    std::size_t first, last;
    std::int64_t sample, samples;
};

struct Batch {
    std::int64_t begin;  // its first token
    std::vector<Piece> pieces;
    std::vector<Group> groups;

    void add(const Piece& piece) {
        if (groups.empty() || piece.sample >= groups.back().sample + group_samples) {
            groups.push_back({pieces.size(), 0, piece.sample, 0});
        }
        pieces.push_back(piece);
        groups.back().last = pieces.size();
        groups.back().samples = piece.sample + 1 - groups.back().sample;
    }
};

std::vector<Batch> cut(const std::int64_t* ends, std::int64_t samples) {
    std::vector<Batch> batches;
    for (std::int64_t s = 0; s < samples; ++s) {
        for (std::int64_t begin = ends[s]; begin < ends[s + 1]; begin += piece_tokens) {
            const std::int64_t end = std::min(begin + piece_tokens, ends[s + 1]);
            if (batches.empty() || end - batches.back().begin > batch_tokens) batches.push_back({begin, {}, {}});
            batches.back().add({s, begin, end});
        }
    }
    return batches;
}

// One product with everything that its threads share.
class Product {
  public:
    Product(const RoutedProduct& p, const TileKernels& kernels, int threads)
        : p_(p),
          kernels_(kernels),
          threads_(threads),
          outputs_(p.transposed ? p.weight.columns : p.weight.rows),
          depth_(p.transposed ? p.weight.rows : p.weight.columns),
          packed_tokens_(std::min(p.ends[p.samples], batch_tokens)),
          tiles_(p.weight, p.transposed ? kernels.width : depth_step, kernels, threads),
          packed_(packed_tokens_ * (depth_ > depth_step ? 2 * depth_step : depth_)),
          room_(kernels.width * depth_step * (2 + p.weight.count + group_samples)),
          rooms_(room_ * std::max(threads, 1)) {
        std::fill_n(rooms_.get(), room_ * std::max(threads, 1), 0.0f);
        ask_for_huge_pages(p.y, p.ends[p.samples] * outputs_ * static_cast<std::int64_t>(sizeof(float)));
    }

    void run() const {
        for (const Batch& batch : cut(p_.ends, p_.samples)) multiply(batch);
    }

  private:
    std::int64_t depth_from(std::int64_t k) const { return std::min(depth_step, depth_ - k); }

    // Of two, one of which is filled while the other one is multiplied; `token` counts from the batch's first one.
    float* packed(std::int64_t k, std::int64_t token) const {
        return packed_.get() + k / depth_step % 2 * packed_tokens_ * depth_step + token * depth_from(k);
    }

    // y[the batch's tokens].
    void multiply(const Batch& batch) const {
        const std::int64_t pieces = static_cast<std::int64_t>(batch.pieces.size());
        const std::int64_t blocks = chunk_count(outputs_, kernels_.width);
        for_each_item_when_free(pieces, threads_, [&](std::int64_t piece, int) { pack(batch, piece, 0); });
        // Once at least: where there is nothing to multiply, results are the bias.
        for (std::int64_t k = 0; k == 0 || k < depth_; k += depth_step) {
            const std::int64_t next = k + depth_step < depth_ ? pieces : 0;
            for_each_item_when_free(next + blocks, threads_, [&](std::int64_t item, int thread) {
                if (item < next) {
                    pack(batch, item, k + depth_step);
                } else {
                    add_block(batch, (item - next) * kernels_.width, k, rooms_.get() + thread * room_);
                }
            });
        }
    }

    // x[a piece's tokens, depth from k on], tile by tile, and in a tile depth first.
    void pack(const Batch& batch, std::int64_t index, std::int64_t k) const {
        const Piece& piece = batch.pieces[static_cast<std::size_t>(index)];
        const std::int64_t depth = depth_from(k);
        kernels_.for_each_tile(piece.end - piece.begin, [&](std::int64_t begin, std::int64_t end) {
            const std::int64_t token = piece.begin + begin;
            kernels_.transpose(packed(k, token - batch.begin), end - begin, p_.x + token * depth_ + k, depth_,
                               end - begin, depth);
        });
    }

    // y[the batch's tokens, width outputs from `output` on] += x[those, depth from k on] W[that part].
    void add_block(const Batch& batch, std::int64_t output, std::int64_t k, float* room) const {
        const std::int64_t width = kernels_.width, used = std::min(width, outputs_ - output);
        const std::int64_t depth = depth_from(k), tile = width * depth, count = p_.weight.count;
        const Window window = p_.transposed ? Window{k, depth, output, used} : Window{output, used, k, depth};
        float *base = room + tile, *taus = base + tile, *mixed = taus + count * tile;
        tiles_.base(base, width, window, !p_.transposed, room);
        for (std::int64_t t = 0; t < count; ++t) tiles_.task(t, taus + t * tile, width, window, !p_.transposed, room);
        for (const Group& members : batch.groups) {
            kernels_.mix(mixed, tile, base, 0, taus, count, p_.gates + members.sample * count, count, members.samples,
                         tile);
            for (std::size_t i = members.first; i < members.last; ++i) {
                const Piece& piece = batch.pieces[i];
                const float* weight = mixed + (piece.sample - members.sample) * tile;
                kernels_.for_each_tile(piece.end - piece.begin, [&](std::int64_t begin, std::int64_t end) {
                    const Piece tokens{piece.sample, piece.begin + begin, piece.begin + end};
                    add_tile(tokens, packed(k, tokens.begin - batch.begin), output, k, weight);
                });
            }
        }
    }

    // One tile of y.
    void add_tile(const Piece& tokens, const float* x, std::int64_t output, std::int64_t k, const float* weight) const {
        static constexpr float zeros[most_of_tile] = {};
        const std::int64_t rows = tokens.end - tokens.begin, width = kernels_.width, depth = depth_from(k);
        const TileKernels::Tile tile = kernels_.tiles[static_cast<std::size_t>(rows - 1)];
        float* y = p_.y + tokens.begin * outputs_ + output;
        const float* from = y;
        std::int64_t from_stride = outputs_;
        if (k == 0) {
            from = p_.bias == nullptr ? zeros : p_.bias + tokens.sample * outputs_ + output;
            from_stride = 0;
        }
        if (output + width <= outputs_) {
            tile(y, outputs_, from, from_stride, x, rows, weight, width, depth);
            return;
        }
        const std::int64_t used = outputs_ - output;
        float results[most_of_tile] = {};
        for (std::int64_t i = 0; i < rows; ++i) std::copy_n(from + i * from_stride, used, results + i * width);
        tile(results, width, results, width, x, rows, weight, width, depth);
        for (std::int64_t i = 0; i < rows; ++i) std::copy_n(results + i * width, used, y + i * outputs_);
    }

    const RoutedProduct& p_;
    const TileKernels& kernels_;
    int threads_;
    std::int64_t outputs_, depth_, packed_tokens_;
    TaskTiles tiles_;
    Floats packed_;
    std::int64_t room_;  // floats, of one thread
    Floats rooms_;
};

}  // namespace

std::vector<int> routed_lanes() {
    std::vector<int> lanes;
    for (const TileKernels& kernels : tile_kernels()) lanes.push_back(kernels.lanes);
    return lanes;
}

void routed_product_cpu(const RoutedProduct& p, int lanes, int threads) {
    Product(p, tile_kernels(lanes), threads).run();
}

}  // namespace pymerge
