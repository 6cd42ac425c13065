/*
 * void hold(const u64 *pattern, u64 *found, u64 spins): loads 14 general registers and XMM0-15 from `pattern`, spins, and
 * stores what they hold then to `found`. RCX counts and RSP is the stack; everything else is held.
 */
    .text
    .globl hold
hold:
    pushq %rbx
    pushq %rbp
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    pushq %rsi
    movq %rdx, %rcx
    .altmacro
    .macro load_sse number
    movups (112 + \number * 16)(%rdi), %xmm\number
    .endm
    .macro store_sse number
    movups %xmm\number, (112 + \number * 16)(%rdi)
    .endm
    .set i, 0
    .rept 16
    load_sse %i
    .set i, i + 1
    .endr
    movq 0(%rdi), %rax
    movq 8(%rdi), %rbx
    movq 16(%rdi), %rdx
    movq 24(%rdi), %rbp
    movq 32(%rdi), %r8
    movq 40(%rdi), %r9
    movq 48(%rdi), %r10
    movq 56(%rdi), %r11
    movq 64(%rdi), %r12
    movq 72(%rdi), %r13
    movq 80(%rdi), %r14
    movq 88(%rdi), %r15
    movq 96(%rdi), %rsi
    movq 104(%rdi), %rdi
1:  decq %rcx
    jnz 1b
    xchgq (%rsp), %rdi              /* the place for results; RDI's own value goes to the stack */
    movq %rax, 0(%rdi)
    movq %rbx, 8(%rdi)
    movq %rdx, 16(%rdi)
    movq %rbp, 24(%rdi)
    movq %r8, 32(%rdi)
    movq %r9, 40(%rdi)
    movq %r10, 48(%rdi)
    movq %r11, 56(%rdi)
    movq %r12, 64(%rdi)
    movq %r13, 72(%rdi)
    movq %r14, 80(%rdi)
    movq %r15, 88(%rdi)
    movq %rsi, 96(%rdi)
    popq 104(%rdi)
    .set i, 0
    .rept 16
    store_sse %i
    .set i, i + 1
    .endr
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbp
    popq %rbx
    ret

    .section .note.GNU-stack, "", @progbits
