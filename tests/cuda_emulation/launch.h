// A launch as the emulation runs it, and what a launch must be.
#pragma once

#include <cstdlib>
#include <source_location>
#include <stdexcept>
#include <string>

#include "cuda/platform.h"

namespace fastres::cuda::emulation {

inline constexpr int kWarp = 32;
inline constexpr int kMostThreads = 1024;
inline constexpr int64_t kMostBlocks = 0x7fffffff;
// What every GPU gives a block that asks for it: `launch` does, `launch_cooperative` does not.
inline constexpr size_t kMostShared = 99 << 10, kMostSharedUnasked = 48 << 10;
inline constexpr size_t kMostArguments = 4 << 10;

// Read at every launch, so that a test can change it at any time.
inline std::string setting(const char* name, const char* otherwise) {
  const char* value = std::getenv((std::string("FASTRES_CUDA_EMULATION_") + name).c_str());
  return value ? value : otherwise;
}

// RESIDENT: how many blocks are alive at the same time.
inline int64_t resident() { return std::stoll(setting("RESIDENT", "4")); }

// "reduce.h:40"
inline std::string place(const std::source_location& site) {
  const std::string file = site.file_name();
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(site.line());
}

struct Launch {
  const char* kernel;
  LaunchShape shape;
  bool cooperative;
  // SEED: of the order in which blocks and threads run.
  unsigned long seed = std::stoul(setting("SEED", "0"));
  // OMIT: a barrier that is left out, as `place` has it. Shows that tests would miss it.
  std::string omitted = setting("OMIT", "");

  bool omits(const std::source_location& site) const {
    return !omitted.empty() && omitted == place(site);
  }

  std::runtime_error error(const std::string& what) const {
    const auto text = [](auto number) { return std::to_string(number); };
    return std::runtime_error(std::string("kernel '") + kernel + "' <<<" + text(shape.blocks) +
                              ", " + text(shape.threads) + ", " + text(shape.shared_bytes) +
                              ">>>: " + what + " (seed " + text(seed) + ")");
  }

  void check() const {
    const auto require = [&](bool holds, const char* what, auto got) {
      if (!holds) {
        throw error(std::string(what) + ", got " + std::to_string(got));
      }
    };
    require(shape.blocks >= 1 && shape.blocks <= kMostBlocks, "blocks must be in 1..2147483647",
            shape.blocks);
    require(shape.threads >= 1 && shape.threads <= kMostThreads, "threads must be in 1..1024",
            shape.threads);
    require(shape.shared_bytes <= kMostShared, "shared_bytes must be at most 101376",
            shape.shared_bytes);
    require(!cooperative || shape.shared_bytes <= kMostSharedUnasked,
            "shared_bytes of a cooperative launch must be at most 49152", shape.shared_bytes);
    require(!cooperative || shape.blocks <= resident(),
            "blocks of a cooperative launch must be at most resident_blocks", shape.blocks);
  }
};

}  // namespace fastres::cuda::emulation
