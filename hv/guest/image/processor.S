/*
 * Where a second processor begins: real mode, in a page below 1 MiB that ap_start..ap_end is copied to. It uses the first
 * one's tables, and goes to 64-bit mode in one step.
 */
#define AP_PAGE 0x8000
#define AT(symbol) (symbol - ap_start + AP_PAGE)

    .section .rodata
    .code16
    .globl ap_start
ap_start:
    cli
    cld
    xorw %ax, %ax
    movw %ax, %ds
    lgdtl AT(ap_gdt_pointer)
    movl $0x620, %eax               /* PAE, and SSE as the first processor may use it */
    movl %eax, %cr4
    movl $level4, %eax
    movl %eax, %cr3
    movl $0xc0000080, %ecx          /* EFER.LME */
    rdmsr
    orl $0x100, %eax
    wrmsr
    movl $0x80000011, %eax
    movl %eax, %cr0
    ljmpl $8, $ap_long
ap_gdt_pointer:
    .word 23
    .long gdt
    .globl ap_end
ap_end:

    .text
    .code64
ap_long:
    movl $16, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %eax, %ss
    movl $ap_stack_top, %esp
    call ap_main
    ud2

    .section .bss
    .align 16
    .skip 8192
ap_stack_top:

    .section .note.GNU-stack, "", @progbits
