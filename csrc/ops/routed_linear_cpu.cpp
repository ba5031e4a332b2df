#include "ops/routed_linear.h"

#include "common/parallel.h"
#include "common/tiles_cpu.h"
#include "ops/task_tiles.h"

namespace pymerge {
namespace {

// What is multiplied at a time, so that mixed weights stay in a core's second-level cache until they are used: up to
// group_samples weights of depth_step x outputs_step. Results depend on depth_step alone.
constexpr std::int64_t depth_step = 256;
constexpr std::int64_t outputs_step = 64;
constexpr std::int64_t group_samples = 8;
constexpr std::int64_t group_tokens = 4096;
constexpr std::int64_t piece_tokens = 512;
// Task vectors whose tiles are in the cache at a time.
constexpr std::int64_t group_tasks = 8;

// Tokens of one sample.
struct Piece {
    std::int64_t sample, begin, end;
};

// Pieces first to last; their samples, of which the weights are mixed together.
struct Group {
    std::size_t first, last;
    std::int64_t sample, samples;
};

std::vector<Piece> cut(const std::int64_t* ends, std::int64_t samples) {
    std::vector<Piece> pieces;
    for (std::int64_t s = 0; s < samples; ++s) {
        for (std::int64_t begin = ends[s]; begin < ends[s + 1]; begin += piece_tokens) {
            pieces.push_back({s, begin, std::min(begin + piece_tokens, ends[s + 1])});
        }
    }
    return pieces;
}

std::vector<Group> group(const std::vector<Piece>& pieces) {
    std::vector<Group> groups;
    for (std::size_t i = 0; i < pieces.size(); ++i) {
        const Piece& piece = pieces[i];
        if (groups.empty() || piece.sample >= groups.back().sample + group_samples ||
            piece.end - pieces[groups.back().first].begin > group_tokens) {
            groups.push_back({i, i, piece.sample, 0});
        }
        groups.back().last = i + 1;
        groups.back().samples = piece.sample + 1 - groups.back().sample;
    }
    return groups;
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
          panels_(outputs_step / kernels.width),
          pieces_(cut(p.ends, p.samples)),
          groups_(group(pieces_)),
          tiles_(p.weight, p.transposed ? kernels.width : depth_step, kernels, threads),
          packed_(p.ends[p.samples] * std::min(depth_, depth_step)) {}

    void run() const {
        const std::int64_t groups = static_cast<std::int64_t>(groups_.size());
        const std::int64_t items = chunk_count(outputs_, outputs_step) * groups;
        const std::int64_t slots = std::clamp<std::int64_t>(items, 1, std::max(threads_, 1));
        const std::int64_t tile = kernels_.width * depth_step;
        const std::int64_t room = tile * (2 + group_tasks + group_samples * panels_);
        const Floats rooms(slots * room);
        std::fill_n(rooms.get(), slots * room, 0.0f);
        // Once at least: where there is nothing to multiply, results are the bias.
        for (std::int64_t k = 0; k == 0 || k < depth_; k += depth_step) {
            const std::int64_t depth = std::min(depth_step, depth_ - k);
            for_each_item(static_cast<std::int64_t>(pieces_.size()), threads_,
                          [&](std::int64_t piece) { pack(pieces_[static_cast<std::size_t>(piece)], k, depth); });
            for_each_item(slots, threads_, [&](std::int64_t slot) {
                for (std::int64_t item = items * slot / slots; item < items * (slot + 1) / slots; ++item) {
                    // Groups one after another: the next one finds the task vectors in the cache.
                    const Group& members = groups_[static_cast<std::size_t>(item % groups)];
                    block(members, item / groups * outputs_step, k, depth, rooms.get() + slot * room);
                }
            });
        }
    }

  private:
    // x[tokens, k : k + depth], tile by tile, and in a tile depth first.
    void pack(const Piece& piece, std::int64_t k, std::int64_t depth) const {
        kernels_.for_each_tile(piece.end - piece.begin, [&](std::int64_t begin, std::int64_t end) {
            const std::int64_t token = piece.begin + begin;
            kernels_.transpose(packed_.get() + token * depth, end - begin, p_.x + token * depth_ + k, depth_,
                               end - begin, depth);
        });
    }

    // y[tokens of the group, outputs from `first` on] += x[:, k : k + depth] W[that part].
    void block(const Group& members, std::int64_t first, std::int64_t k, std::int64_t depth, float* room) const {
        const std::int64_t tile = kernels_.width * depth;
        float* mixed = room + kernels_.width * depth_step * (2 + group_tasks);
        for (std::int64_t panel = 0; panel < panels_ && first + panel * kernels_.width < outputs_; ++panel) {
            mix(members, first + panel * kernels_.width, k, depth, room, mixed + panel * tile);
        }
        for (std::size_t i = members.first; i < members.last; ++i) {
            const Piece& piece = pieces_[i];
            const float* weight = mixed + (piece.sample - members.sample) * panels_ * tile;
            kernels_.for_each_tile(piece.end - piece.begin, [&](std::int64_t begin, std::int64_t end) {
                for (std::int64_t panel = 0; panel < panels_ && first + panel * kernels_.width < outputs_; ++panel) {
                    multiply({piece.sample, piece.begin + begin, piece.begin + end}, first + panel * kernels_.width, k,
                             depth, weight + panel * tile);
                }
            });
        }
    }

    // The mixed weights of the group's samples, depth x width each, panels_ such tiles apart.
    void mix(const Group& members, std::int64_t output, std::int64_t k, std::int64_t depth, float* room,
             float* mixed) const {
        const std::int64_t width = kernels_.width, tile = width * depth;
        const std::int64_t used = std::min(width, outputs_ - output);
        const Window window = p_.transposed ? Window{k, depth, output, used} : Window{output, used, k, depth};
        float* base = room + width * depth_step;
        float* taus = base + tile;
        tiles_.base(base, width, window, !p_.transposed, room);
        std::int64_t t = 0;
        do {
            const std::int64_t count = std::min(group_tasks, p_.weight.count - t);
            for (std::int64_t i = 0; i < count; ++i) {
                tiles_.task(t + i, taus + i * tile, width, window, !p_.transposed, room);
            }
            const std::int64_t stride = panels_ * tile;
            kernels_.mix(mixed, stride, t == 0 ? base : mixed, t == 0 ? 0 : stride, taus, count,
                         p_.gates + members.sample * p_.weight.count + t, p_.weight.count, members.samples, tile);
            t += count;
        } while (t < p_.weight.count);
    }

    // One tile of y.
    void multiply(const Piece& tokens, std::int64_t output, std::int64_t k, std::int64_t depth,
                  const float* weight) const {
        static constexpr float zeros[most_of_tile] = {};
        const std::int64_t rows = tokens.end - tokens.begin, width = kernels_.width;
        const TileKernels::Tile tile = kernels_.tiles[static_cast<std::size_t>(rows - 1)];
        const float* x = packed_.get() + tokens.begin * depth;
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
    std::int64_t outputs_, depth_, panels_;
    std::vector<Piece> pieces_;
    std::vector<Group> groups_;
    TaskTiles tiles_;
    Floats packed_;
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
