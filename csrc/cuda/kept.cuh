// What a block keeps of its octets from the walk of a first stage to that of the second: in shared
// memory as many rounds as that holds, from the first round on; and in registers the last rounds,
// which the first stage has just had in flight. Walking backwards, the second stage meets first
// these, then what the first has just left in L2, and then what lies in shared memory. Every thread
// finds its own octets alone, so that nobody waits for anybody.

#pragma once

#include "octet.cuh"

namespace fusedskip::cuda {

// Between two launches nothing is kept.
template <typename T>
struct NothingKept {
  static constexpr int kHeld = 0;

  struct Round {
    __device__ static Octet<T> octet(int) { return {}; }
    __device__ static uint32_t bits() { return 0; }
  };

  __device__ static constexpr bool has(int) { return false; }
  __device__ static void put(int, int, int, const Octet<T>&) {}
  __device__ static void put_bits(int, int, uint32_t) {}
  __device__ static Round in_shared(int) { return {}; }
  __device__ static Round in_registers(int) { return {}; }
};

// Of kTensors tensors and, with kMask, of the mask. `rounds` of them fit shared memory, and kHeld
// registers: the last batch, or nothing. Numbers in a batch are constants.
template <typename T, int kTensors, bool kMask, int kHeldRounds>
class KeptOnChip {
  static constexpr int kAccesses = sizeof(Octet<T>) / sizeof(uint4);

 public:
  static constexpr int kHeld = kHeldRounds;
  static constexpr int kBytesARound = kThreads * (kTensors * int(sizeof(Octet<T>)) + kMask);

  __device__ explicit KeptOnChip(int rounds) : rounds_(rounds) {
    extern __shared__ uint4 kept[];
    octets_ = kept + threadIdx.x;
    bits_ =
        reinterpret_cast<uint8_t*>(kept + rounds * kTensors * kAccesses * kThreads) + threadIdx.x;
  }

  // In shared memory. A walk may ask for rounds below 0.
  __device__ bool has(int round) const { return unsigned(round) < unsigned(rounds_); }

  // A round that is number u of its batch.
  __device__ void put(int round, int u, int tensor, const Octet<T>& octet) {
    if (u < kHeld) held_[u].octets[tensor] = octet;
    if (!has(round)) return;
#pragma unroll
    for (int i = 0; i < kAccesses; ++i)
      *access(round, tensor, i) = reinterpret_cast<const uint4*>(&octet)[i];
  }
  __device__ void put_bits(int round, int u, uint32_t bits) {
    if (u < kHeld) held_[u].passes = bits;
    if (kMask && has(round)) bits_[round * kThreads] = uint8_t(bits);
  }

  struct InShared {
    const KeptOnChip& kept;
    int round;

    __device__ Octet<T> octet(int tensor) const {
      Octet<T> octet;
#pragma unroll
      for (int i = 0; i < kAccesses; ++i)
        reinterpret_cast<uint4*>(&octet)[i] = *kept.access(round, tensor, i);
      return octet;
    }
    __device__ uint32_t bits() const { return kMask ? kept.bits_[round * kThreads] : 0xff; }
  };
  struct InRegisters {
    Octet<T> octets[kTensors];
    uint32_t passes;

    __device__ Octet<T> octet(int tensor) const { return octets[tensor]; }
    __device__ uint32_t bits() const { return passes; }
  };

  __device__ InShared in_shared(int round) const { return {*this, round}; }
  __device__ const InRegisters& in_registers(int u) const { return held_[u]; }

 private:
  // A warp's accesses are 512 bytes in a row, which is what the banks can do.
  __device__ uint4* access(int round, int tensor, int i) const {
    return octets_ + ((round * kTensors + tensor) * kAccesses + i) * kThreads;
  }

  int rounds_;
  uint4* octets_;
  uint8_t* bits_;
  InRegisters held_[std::max(1, kHeld)];
};

// For the second stage, behind the batch in registers.
template <int kWidth, typename T, typename Kept>
__device__ Octet<T> kept_or_loaded(const Kept& kept, int round, int tensor, const T* p,
                                   const Place& place) {
  return kept.has(round) ? kept.in_shared(round).octet(tensor) : load<kWidth, Use::kLast>(p, place);
}

}  // namespace fusedskip::cuda
