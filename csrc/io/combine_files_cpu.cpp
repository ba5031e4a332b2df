#include "io/combine_files.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <vector>

#include "common/dispatch.h"
#include "common/finite.h"
#include "ops/combine.h"

namespace pymerge {
namespace {

struct alignas(64) Line {
    char bytes[64];
};

std::int64_t item_size(DType dtype) {
    return dispatch(dtype, [](auto tag) { return static_cast<std::int64_t>(sizeof(typename decltype(tag)::type)); });
}

// Reads `nbytes` bytes from `offset` on; says in `result` where that failed.
bool read_fully(int descriptor, char* to, std::int64_t nbytes, std::int64_t offset, CombineFilesResult& result) {
    const auto began = std::chrono::steady_clock::now();
    std::int64_t done = 0;
    while (done < nbytes) {
        const ssize_t count = ::pread(descriptor, to + done, static_cast<std::size_t>(nbytes - done), offset + done);
        if (count < 0 && errno == EINTR) continue;
        if (count <= 0) {
            result.error = count < 0 ? errno : 0;
            result.at = offset + done;
            break;
        }
        done += count;
    }
    result.reading_ns +=
        std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now() - began).count();
    return done == nbytes;
}

}  // namespace

CombineFilesResult combine_files_cpu(const CombineFilesParams& p) {
    PM_CHECK(p.numel >= 0 && p.block > 0, "combine_files: " << p.numel << " elements in blocks of " << p.block);
    PM_CHECK(p.count > 0 || p.base != nullptr, "combine_files: neither a base nor inputs; give one");
    std::vector<FileTensor> files;  // the base first, if there is one
    if (p.base != nullptr) files.push_back(*p.base);
    files.insert(files.end(), p.inputs, p.inputs + p.count);
    // Kept by each thread for its next call: fresh memory has to be mapped page by page.
    thread_local std::vector<Line> scratch;
    std::vector<std::size_t> starts;
    std::size_t lines = 0;
    for (const FileTensor& file : files) {
        starts.push_back(lines);
        lines += static_cast<std::size_t>(std::min(p.block, p.numel) * item_size(file.dtype)) / sizeof(Line) + 1;
    }
    if (scratch.size() < lines) scratch.resize(lines);
    std::vector<MatrixView> blocks;
    for (std::size_t k = 0; k < files.size(); ++k) {
        blocks.push_back({scratch.data() + starts[k], files[k].dtype, p.block});
    }
    const std::size_t first = p.base == nullptr ? 0 : 1;
    const MatrixView base = p.base == nullptr ? MatrixView{} : blocks[0];
    CombineParams block{p.out, base, blocks.data() + first, p.weights, p.divisor, p.count, 0};
    CombineFilesResult result;
    for (std::int64_t at = 0; at < p.numel; at += p.block) {
        block.numel = std::min(p.block, p.numel - at);
        for (std::size_t k = 0; k < files.size(); ++k) {
            const std::int64_t size = item_size(files[k].dtype);
            char* to = reinterpret_cast<char*>(scratch.data() + starts[k]);
            if (!read_fully(files[k].descriptor, to, block.numel * size, files[k].offset + at * size, result)) {
                result.failed = static_cast<std::int64_t>(k);
                return result;
            }
            if (p.check_inputs && !is_finite_cpu(to, files[k].dtype, block.numel)) result.finite = false;
        }
        block.out.data = static_cast<char*>(p.out.data) + at * item_size(p.out.dtype);
        combine_cpu(block, 1);
        if (!is_finite_cpu(block.out.data, p.out.dtype, block.numel)) result.finite = false;
    }
    return result;
}

}  // namespace pymerge
