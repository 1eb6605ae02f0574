// The recurrence: the exact meta-gradient of an inner loop without an autograd graph.
//
// Task loss  L = u·L_support(θ₀) + Σₖ wₖ L_query(θₖ),   θₖ₊₁ = θₖ − αₖ ⊙ gₖ,   gₖ = ∇L_support(θₖ),   k = 0 … K−1.
//
//     v_K = w_K ∇L_query(θ_K)
//     v_k = v_{k+1} − H_support(θ_k)·(α_k ⊙ v_{k+1}) + w_k ∇L_query(θ_k)
//     ∇L = v_0 + u ∇L_support(θ_0),       dL/dα_k = −v_{k+1} ⊙ g_k
//
// First order drops the H term alone. It is written once, over an executor that holds one unit of work (one task, or a
// vector of tasks of which each lane is one) with its v, which starts at 0:
//
//     support_pass(k)              L_support(θ_k) and gₖ
//     descend(k)                   θ_{k+1} = θ_k − α_k ⊙ gₖ
//     add_support_loss(u)          adds u·L_support(θ_0), of support_pass(0), to the task's loss
//     query_pass(k, w, backward)   adds w·L_query(θ_k) to the task's loss, and w·∇L_query(θ_k) to v if backward;
//                                  the outputs at the last k are the task's logits
//     add_rate_gradient(k)         dL/dα_k = −v ⊙ gₖ
//     subtract_hessian_product(k)  v ← v − H_support(θ_k)·(α_k ⊙ v)
//     add_support_gradient(u)      v ← v + u g₀
//     finish()                     v is complete
//
// Without the recurrence, the product alone of a Hessian and directions that the request brings:
//
//     add_hessian_product()        v ← v + H_support(θ_0)·direction, after support_pass(0)
#pragma once

#include "engine/request.h"

namespace innerloop::INNERLOOP_ISA {

template <class Executor, class T>
void run_recurrence(Executor& executor, const Request<T>& request) {
  const int64_t K = request.steps;
  const std::vector<T>& w = request.step_weights;
  const T u = request.support_weight;
  const bool backward = request.wants_gradients();

  for (int64_t k = 0; k < K; ++k) {
    executor.support_pass(k);
    if (k == 0 && u != 0) executor.add_support_loss(u);
    // With gradients the way back visits θ_k again; without, θ_k is gone after this step.
    if (!backward && w[static_cast<size_t>(k)] != 0) executor.query_pass(k, w[static_cast<size_t>(k)], false);
    executor.descend(k);
  }
  if (K == 0 && u != 0) {
    executor.support_pass(0);
    executor.add_support_loss(u);
  }
  const T last = w[static_cast<size_t>(K)];
  executor.query_pass(K, last, backward && last != 0);
  if (!backward) return;

  for (int64_t k = K - 1; k >= 0; --k) {
    if (!request.rate_gradients.empty()) executor.add_rate_gradient(k);
    if (!request.first_order) executor.subtract_hessian_product(k);
    if (w[static_cast<size_t>(k)] != 0) executor.query_pass(k, w[static_cast<size_t>(k)], true);
  }
  if (u != 0) executor.add_support_gradient(u);
  executor.finish();
}

template <class Executor, class T>
void run_request(Executor& executor, const Request<T>& request) {
  if (!request.wants_products()) return run_recurrence(executor, request);
  executor.support_pass(0);
  executor.add_hessian_product();
}

}  // namespace innerloop::INNERLOOP_ISA
