// The part of cooperative groups that the kernels use; see cuda_runtime.h beside it.
#pragma once

#include "cuda_runtime.h"

#define _CG_HAS_CLUSTER_GROUP

namespace cooperative_groups {

struct cluster_group {
  unsigned num_blocks() const { return static_cast<unsigned>(emulator::launch->blocks.size()); }
  unsigned block_rank() const { return static_cast<unsigned>(emulator::self->block); }
  void sync(emulator::Place place = EMULATOR_PLACE) const {
    emulator::meet(emulator::launch->cluster, emulator::Wait::kCluster, place);
  }
  // Pointers outside of the block's shared memory have no counterpart in another block.
  template <class T>
  T* map_shared_rank(T* own, int rank) const {
    const std::vector<char>& from = emulator::own_block().shared;
    const auto offset = reinterpret_cast<uintptr_t>(own) - reinterpret_cast<uintptr_t>(from.data());
    if (offset >= from.size()) emulator::fail("an address outside of shared memory is mapped");
    if (rank < 0 || rank >= static_cast<int>(num_blocks())) {
      emulator::fail("block " + std::to_string(rank) + " is not in the cluster");
    }
    return reinterpret_cast<T*>(emulator::launch->blocks[rank].shared.data() + offset);
  }
};

inline cluster_group this_cluster() { return {}; }

}  // namespace cooperative_groups
