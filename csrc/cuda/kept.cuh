// What a block keeps of its octets from the walk of a first stage to that of the second, in shared
// memory: as many rounds as that holds, from the first round on. Walking backwards, the second
// stage meets first what the first stage has just left in L2, and then what was kept. Every thread
// finds its own octets alone, so that nobody waits for anybody.

#pragma once

#include "octet.cuh"

namespace fusedskip::cuda {

// Between two launches nothing is kept.
template <typename T>
struct NothingKept {
  __device__ static constexpr bool has(int) { return false; }
  __device__ static void put(int, int, const Octet<T>&) {}
  __device__ static Octet<T> get(int, int) { return {}; }
  __device__ static void put_bits(int, uint32_t) {}
  __device__ static uint32_t get_bits(int) { return 0; }
};

// Of kTensors tensors and, with kMask, of the mask. `rounds` of them fit.
template <typename T, int kTensors, bool kMask>
class KeptOnChip {
  static constexpr int kAccesses = sizeof(Octet<T>) / sizeof(uint4);

 public:
  static constexpr int kBytesARound = kThreads * (kTensors * int(sizeof(Octet<T>)) + kMask);

  __device__ explicit KeptOnChip(int rounds) : rounds_(rounds) {
    extern __shared__ uint4 kept[];
    octets_ = kept + threadIdx.x;
    bits_ =
        reinterpret_cast<uint8_t*>(kept + rounds * kTensors * kAccesses * kThreads) + threadIdx.x;
  }

  // A walk that is done may ask for rounds below 0.
  __device__ bool has(int round) const { return unsigned(round) < unsigned(rounds_); }

  __device__ void put(int round, int tensor, const Octet<T>& octet) {
    if (!has(round)) return;
#pragma unroll
    for (int i = 0; i < kAccesses; ++i)
      *access(round, tensor, i) = reinterpret_cast<const uint4*>(&octet)[i];
  }
  __device__ Octet<T> get(int round, int tensor) const {
    Octet<T> octet;
#pragma unroll
    for (int i = 0; i < kAccesses; ++i)
      reinterpret_cast<uint4*>(&octet)[i] = *access(round, tensor, i);
    return octet;
  }

  __device__ void put_bits(int round, uint32_t bits) {
    if (kMask && has(round)) bits_[round * kThreads] = uint8_t(bits);
  }
  __device__ uint32_t get_bits(int round) const { return kMask ? bits_[round * kThreads] : 0xff; }

 private:
  // A warp's accesses are 512 bytes in a row, which is what the banks can do.
  __device__ uint4* access(int round, int tensor, int i) const {
    return octets_ + ((round * kTensors + tensor) * kAccesses + i) * kThreads;
  }

  int rounds_;
  uint4* octets_;
  uint8_t* bits_;
};

// For the second stage.
template <int kWidth, typename T, typename Kept>
__device__ Octet<T> kept_or_loaded(const Kept& kept, int round, int tensor, const T* p,
                                   const Place& place) {
  return kept.has(round) ? kept.get(round, tensor) : load<kWidth, Use::kLast>(p, place);
}

}  // namespace fusedskip::cuda
