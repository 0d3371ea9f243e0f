// The layout of a kernel's dynamic shared memory: pieces one after another, each named by a type of its own.
//
//   struct Tiles : SharedPiece<half, 8192, 4> {};  // four tiles of 8192 bytes
//   struct Plans : SharedPiece<Plan, sizeof(Plan), kWarps> {};
//   using Layout = SharedLayout<Tiles, Plans>;
//
//   const Layout layout{shared_memory()};
//   layout.declare();
//   half* tile = layout.at<Tiles>(3);
//
// The kernel is launched with Layout::kBytes bytes. declare(), which every thread calls first, announces every copy of
// every piece to the emulator. Layout::at<Tiles>(shared_memory(), 3) is the same tile; compilers derive other addresses
// from it, and a kernel uses the form that takes fewer instructions.
//
// The emulator reports accesses outside the announced pieces, and leaves kSharedGap bytes free after every copy, so
// that whatever runs over the end of one is seen.
#pragma once

#include <type_traits>

#include "platform.cuh"

namespace prefix_kernels::cuda {

// kCopies pieces of kBytes bytes each, which begin at multiples of kAlignment; none if kCopies is 0.
template <typename Element_, int kBytes_ = static_cast<int>(sizeof(Element_)), int kCopies_ = 1, int kAlignment_ = 128>
struct SharedPiece {
  using Element = Element_;
  static constexpr int kBytes = kBytes_, kCopies = kCopies_, kAlignment = kAlignment_;
  static constexpr int kStride = (kBytes + kAlignment - 1) / kAlignment * kAlignment + kSharedGap;
  static constexpr int kTotal = kCopies * kStride;
  static_assert(kAlignment % alignof(Element) == 0 && kSharedGap % kAlignment == 0);
};

// The pieces in their order, the first at the beginning of the memory.
template <typename... Pieces>
struct SharedLayout {
  char* memory;  // result of shared_memory()

  static constexpr int kBytes = (0 + ... + Pieces::kTotal);

  // The offset of a piece in bytes.
  template <typename Piece>
  static constexpr int kOffset = [] {
    int offset = 0;
    bool found = false;
    ((found = found || std::is_same_v<Piece, Pieces>, offset += found ? 0 : Pieces::kTotal), ...);
    return offset;
  }();
  static_assert(((kOffset<Pieces> % Pieces::kAlignment == 0) && ...), "pieces of larger alignment come first");

  template <typename Piece>
  static __device__ __forceinline__ typename Piece::Element* at(char* memory, int copy = 0) {
    static_assert((std::is_same_v<Piece, Pieces> || ...), "a piece of this layout");
    return reinterpret_cast<typename Piece::Element*>(memory + kOffset<Piece> + copy * Piece::kStride);
  }

  template <typename Piece>
  __device__ __forceinline__ typename Piece::Element* at(int copy = 0) const {
    static_assert((std::is_same_v<Piece, Pieces> || ...), "a piece of this layout");
    return reinterpret_cast<typename Piece::Element*>(memory + kOffset<Piece> + copy * Piece::kStride);
  }

  __device__ __forceinline__ void declare() const {
    const auto declare_copies = [](auto* first, int bytes, int stride, int copies) {
      for (int i = 0; i < copies; ++i) shared_buffer(reinterpret_cast<char*>(first) + i * stride, bytes);
    };
    (declare_copies(at<Pieces>(), Pieces::kBytes, Pieces::kStride, Pieces::kCopies), ...);
  }

  // The memory of all copies of a piece for kNeeded bytes of other data, while nobody needs the piece.
  template <typename Piece, typename Other, int kNeeded>
  __device__ __forceinline__ Other* reuse() const {
    static_assert(kNeeded <= Piece::kTotal - Piece::kCopies * kSharedGap, "other data fits where the piece was");
    auto* const first = reinterpret_cast<Other*>(at<Piece>());
    shared_buffer(first, kNeeded);
    return first;
  }
};

}  // namespace prefix_kernels::cuda
