#![allow(clippy::unwrap_used)]

mod common;

use common::{Bits, bits, cast, normal};
use half::bf16;
use halfbyte_core::codebook::dynamic_map;
use halfbyte_core::ops::adamw::{AdamwScalars, Address, Moments, PAGE_ELEMENTS, Slab, Target, Update, run_on_cpu};
use halfbyte_core::{TensorMut, TensorRef, parallel};

const SCALARS: AdamwScalars =
    AdamwScalars { lr: 1e-3, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 1e-2, step: 1 };

/// Parameters with their pages, each page apart from the others.
struct State<T> {
    params: Vec<Vec<T>>,
    slab: Slab,
    /// page memory, in words so that it is aligned
    pages: Vec<Vec<u64>>,
}

impl<T: Bits> State<T> {
    fn new(moments: Moments, params: Vec<Vec<T>>) -> Self {
        let slab = Slab::new(moments, &params.iter().map(Vec::len).collect::<Vec<_>>()).unwrap();
        let mut pages = vec![vec![0; moments.page_bytes() / 8]; slab.pages()];
        if moments == Moments::Block8 {
            pages.iter_mut().for_each(|page| page[..PAGE_ELEMENTS / 8].fill(0x7f7f_7f7f_7f7f_7f7f));
        }
        Self { params, slab, pages }
    }

    fn step(&mut self, grads: &[Option<Vec<T>>], step: u64, grad_scale: Option<f32>) {
        let (scalars, moments) = (AdamwScalars { step, ..SCALARS }, self.slab.moments());
        let target = |(param, grad): (&mut Vec<T>, &Option<Vec<T>>)| {
            let grad = grad.as_deref().map(TensorRef::from_slice);
            Target::new(TensorMut::from_slice(param), grad, &scalars, moments).unwrap()
        };
        let targets: Vec<Target> = self.params.iter_mut().zip(grads).map(target).collect();
        let pages: Vec<Address> = self.pages.iter_mut().map(|page| address(page)).collect();
        let work: Vec<u32> = (0..pages.len() as u32).rev().collect();
        let scale = grad_scale.map(|scale| vec![scale]);
        let grad_scale = scale.as_ref().map_or(0, |scale| scale.as_ptr().expose_provenance() as Address);
        let update = Update { slab: &self.slab, pages: &pages, work: &work, targets: &targets, grad_scale };
        // SAFETY: every address is of memory that this function borrows.
        unsafe { run_on_cpu(&update, 0..work.len()) };
    }

    /// Moment `which` (0 or 1) of element `i` of parameter `param`.
    fn moment(&self, param: usize, which: usize, i: usize) -> f32 {
        let at = self.slab.first_block(param) * 256 + i;
        let (page, at) = (&self.pages[at / PAGE_ELEMENTS], at % PAGE_ELEMENTS);
        let float = |byte: usize| f32::from_bits((page[byte / 8] >> (8 * (byte % 8))) as u32);
        let offsets = self.slab.moments().offsets();
        match self.slab.moments() {
            Moments::Fp32 => float(offsets[which] + 4 * at),
            Moments::Block8 => {
                dynamic_map(which == 0)[self.code(param, which, i) as usize] * {
                    float(offsets[which + 2] + 4 * (at / 256))
                }
            }
        }
    }

    fn code(&self, param: usize, which: usize, i: usize) -> u8 {
        let at = self.slab.first_block(param) * 256 + i;
        let byte = self.slab.moments().offsets()[which] + at % PAGE_ELEMENTS;
        (self.pages[at / PAGE_ELEMENTS][byte / 8] >> (8 * (byte % 8))) as u8
    }
}

fn address(page: &mut [u64]) -> Address {
    page.as_mut_ptr().expose_provenance() as Address
}

/// AdamW in fp64, straight from the paper.
fn reference(param: &[f32], grads: &[Vec<f32>]) -> Vec<f64> {
    let AdamwScalars { lr, beta1, beta2, eps, weight_decay, .. } = SCALARS;
    let one = |i: usize| {
        let (mut p, mut m, mut v) = (f64::from(param[i]), 0.0, 0.0);
        for (t, grad) in grads.iter().enumerate() {
            let (g, t) = (f64::from(grad[i]), t as i32 + 1);
            m = beta1 * m + (1.0 - beta1) * g;
            v = beta2 * v + (1.0 - beta2) * g * g;
            let (m_hat, v_hat) = (m / (1.0 - beta1.powi(t)), v / (1.0 - beta2.powi(t)));
            p -= lr * weight_decay * p;
            p -= lr * m_hat / (v_hat.sqrt() + eps);
        }
        p
    };
    (0..param.len()).map(one).collect()
}

#[test]
fn ten_steps_agree_with_fp64() {
    // The second parameter lies in two pages.
    let params = vec![normal(20_001, 1), normal(PAGE_ELEMENTS, 2), normal(1, 3)];
    let mut state = State::new(Moments::Fp32, params.clone());
    let grads: Vec<Vec<Vec<f32>>> =
        (0..10).map(|t| params.iter().map(|param| normal(param.len(), 10 + t)).collect()).collect();
    for (t, grads) in grads.iter().enumerate() {
        state.step(&grads.iter().cloned().map(Some).collect::<Vec<_>>(), t as u64 + 1, None);
    }
    for (i, param) in params.iter().enumerate() {
        let grads: Vec<Vec<f32>> = grads.iter().map(|of_step| of_step[i].clone()).collect();
        for (value, expected) in state.params[i].iter().zip(reference(param, &grads)) {
            assert!((f64::from(*value) - expected).abs() <= 1e-6 * expected.abs().max(1.0));
        }
    }
}

#[test]
fn a_parameter_has_the_same_bits_alone_and_among_others() {
    for moments in [Moments::Fp32, Moments::Block8] {
        let sizes = [300, 0, PAGE_ELEMENTS + 77, 1, 5000];
        let params: Vec<Vec<f32>> = sizes.iter().map(|&n| normal(n, n as u64)).collect();
        let mut together = State::new(moments, params.clone());
        let mut apart: Vec<_> = params.into_iter().map(|param| State::new(moments, vec![param])).collect();
        for step in 1..4 {
            let grads: Vec<_> = sizes.iter().map(|&n| Some(normal(n, step * 1000 + n as u64))).collect();
            together.step(&grads, step, Some(0.7));
            for (alone, grad) in apart.iter_mut().zip(grads) {
                alone.step(&[grad], step, Some(0.7));
            }
        }
        for (i, alone) in apart.iter().enumerate() {
            assert_eq!(bits(&together.params[i]), bits(&alone.params[0]), "{moments:?} {i}");
        }
    }
}

#[test]
fn what_has_no_gradient_stays() {
    let params = vec![normal(1000, 1), normal(1000, 2)];
    let mut state = State::new(Moments::Block8, params.clone());
    state.step(&[None, Some(normal(1000, 3))], 1, None);
    assert_eq!(state.params[0], params[0]);
    assert!(state.params[1] != params[1]);
    assert_eq!((state.code(0, 0, 5), state.code(0, 1, 5)), (127, 0));
}

#[test]
fn the_scale_multiplies_the_gradient() {
    let grad = normal(1000, 2);
    let halved: Vec<f32> = grad.iter().map(|g| g * 0.5).collect();
    for moments in [Moments::Fp32, Moments::Block8] {
        let fresh = || State::new(moments, vec![normal(1000, 1)]);
        let (mut scaled, mut plain) = (fresh(), fresh());
        scaled.step(&[Some(grad.clone())], 1, Some(0.5));
        plain.step(&[Some(halved.clone())], 1, None);
        assert_eq!((scaled.params, scaled.pages), (plain.params, plain.pages));
    }
}

#[test]
fn a_16_bit_parameter_is_rounded_once() {
    let narrow_param: Vec<bf16> = cast(&normal(1000, 1));
    let grad: Vec<bf16> = cast(&normal(1000, 2));
    let widen = |values: &[bf16]| values.iter().map(|value| value.to_f32()).collect::<Vec<f32>>();
    let mut wide = State::new(Moments::Fp32, vec![widen(&narrow_param)]);
    let mut narrow = State::new(Moments::Fp32, vec![narrow_param]);
    wide.step(&[Some(widen(&grad))], 1, None);
    narrow.step(&[Some(grad)], 1, None);
    assert_eq!(narrow.params[0], cast::<bf16>(&wide.params[0]));
    assert_eq!(narrow.pages, wide.pages);
}

#[test]
fn the_published_weights_of_three_8_bit_steps() {
    let param = (0..8192).map(|i| (-1.0 + 2.0 * i as f64 / 8191.0) as f32).collect();
    let mut state = State::new(Moments::Block8, vec![param]);
    let grad: Vec<f32> = (0..8192).map(|i| 0.01 * (i as f32).sin()).collect();
    for step in 1..=3 {
        state.step(&[Some(grad.clone())], step, None);
    }
    let expected = [-0.999_969_96f32, -1.002_721_5, -1.002_48];
    assert!(state.params[0].iter().zip(expected).all(|(value, expected)| (value - expected).abs() < 2.5e-7));
}

#[test]
fn a_gradient_that_is_not_finite_clears_its_state_and_leaves_its_weight() {
    let mut state = State::new(Moments::Block8, vec![normal(300, 1)]);
    state.step(&[Some(normal(300, 2))], 1, None);
    let (before, mut grad) = (state.params[0].clone(), normal(300, 3));
    (grad[5], grad[280]) = (f32::NAN, f32::NEG_INFINITY);
    state.step(&[Some(grad)], 2, None);
    for i in [5, 280] {
        assert_eq!((state.params[0][i], state.code(0, 0, i), state.code(0, 1, i)), (before[i], 127, 0));
    }
    assert_eq!(state.params[0].iter().zip(&before).filter(|(now, before)| now == before).count(), 2);
    assert!((0..300).all(|i| state.moment(0, 0, i).is_finite() && state.moment(0, 1, i).is_finite()));
}

#[test]
fn a_code_keeps_the_sign_of_the_moment() {
    let mut grad = vec![1e-9f32; 256];
    (grad[0], grad[1], grad[2]) = (1.0, -1e-9, 0.0);
    let mut state = State::new(Moments::Block8, vec![vec![0f32; 256]]);
    state.step(&[Some(grad)], 1, None);
    assert_eq!([0, 1, 2, 3].map(|i| state.code(0, 0, i)), [255, 126, 127, 127]);
    assert!(state.moment(0, 0, 1) < 0.0 && state.moment(0, 0, 2) == 0.0);
}

#[test]
fn the_number_of_threads_changes_nothing() {
    for moments in [Moments::Fp32, Moments::Block8] {
        let results = [1, 2, 3].map(|threads| {
            parallel::set_num_threads(threads);
            let mut state = State::new(moments, vec![normal(200_001, 1)]);
            state.step(&[Some(normal(200_001, 2))], 1, None);
            (state.params, state.pages)
        });
        parallel::set_num_threads(0);
        assert!(results.windows(2).all(|pair| pair[0] == pair[1]));
    }
}

#[test]
fn impossible_arguments_are_named() {
    let check = |scalars: AdamwScalars, grad: usize| {
        let (mut p, g) = ([0f32; 2], vec![0f32; grad]);
        let target =
            Target::new(TensorMut::from_slice(&mut p), Some(TensorRef::from_slice(&g)), &scalars, Moments::Fp32);
        target.map(|_| ()).unwrap_err().to_string()
    };
    assert_eq!(check(AdamwScalars { step: 0, ..SCALARS }, 2), "adamw: step must be >= 1, got 0");
    assert_eq!(check(AdamwScalars { beta2: 1.0, ..SCALARS }, 2), "adamw: beta2 must be in [0, 1), got 1");
    assert_eq!(check(AdamwScalars { lr: f64::NAN, ..SCALARS }, 2), "adamw: lr must be finite and >= 0, got NaN");
    assert_eq!(check(SCALARS, 3), "adamw: grad must have 2 elements (one an element of param), got 3");
    let too_many = Slab::new(Moments::Fp32, &[usize::MAX / 2]).map(|_| ()).unwrap_err().to_string();
    assert!(too_many.contains("fewer than 2^40 elements"), "{too_many}");
}
